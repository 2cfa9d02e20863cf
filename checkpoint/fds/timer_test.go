package fds

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A periodic timer that fires all the time is never taken for a disarmed one,
// though fdinfo shows no time left while its last firing was not read.
func TestTimerThatFiresBetweenTwoLooks(t *testing.T) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(1), Interval: unix.NsecToTimespec(20000)}
	if err := unix.TimerfdSettime(fd, 0, &spec, nil); err != nil {
		t.Fatal(err)
	}
	again := 0
	for range 5000 {
		ticks, value, err := settle(fd)
		if err != nil {
			t.Fatal(err)
		}
		if value == 0 || ticks == 0 {
			t.Fatalf("a timer that runs has %d ticks and %d ns left", ticks, value)
		}
		if value == 20000 {
			again++
		}
	}
	t.Logf("it had fired again %d times", again)
}
