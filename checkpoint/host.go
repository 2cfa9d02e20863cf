package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

// ThisHost says what this host offers to a process.
func ThisHost() (image.Host, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return image.Host{}, os.NewSyscallError("uname", err)
	}
	h := image.Host{Kernel: text(u.Release[:]), Machine: text(u.Machine[:]), Node: text(u.Nodename[:])}
	h.XFeatures, h.XSize = sys.XState()
	return h, nil
}

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// Clocks returns the monotonic and boot-time clocks as process pid sees them,
// which may live in a time namespace.
func Clocks(pid int) (monotonic, boottime time.Duration, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timens_offsets", pid))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, 0, err
	}
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
			return 0, 0, &Error{"read the clocks of", pid, ErrNoProcess}
		}
	}
	offset, err := timensOffsets(string(b))
	if err != nil {
		return 0, 0, &Error{"read the clocks of", pid, err}
	}
	own, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, 0, err
	}
	ours, err := timensOffsets(string(own))
	if err != nil {
		return 0, 0, err
	}
	read := func(clock int32) (time.Duration, error) {
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			return 0, os.NewSyscallError("clock_gettime", err)
		}
		return time.Duration(ts.Nano()), nil
	}
	if monotonic, err = read(unix.CLOCK_MONOTONIC); err != nil {
		return 0, 0, err
	}
	if boottime, err = read(unix.CLOCK_BOOTTIME); err != nil {
		return 0, 0, err
	}
	return monotonic + offset["monotonic"] - ours["monotonic"], boottime + offset["boottime"] - ours["boottime"], nil
}

// timensOffsets parses /proc/PID/timens_offsets: clock, seconds, nanoseconds.
func timensOffsets(s string) (map[string]time.Duration, error) {
	m := map[string]time.Duration{}
	for line := range strings.Lines(s) {
		var name string
		var sec, nsec int64
		if _, err := fmt.Sscan(line, &name, &sec, &nsec); err != nil {
			return nil, fmt.Errorf("time namespace offsets: %q: %w", line, err)
		}
		// Older kernels print the clock's number.
		switch name {
		case "1":
			name = "monotonic"
		case "7":
			name = "boottime"
		}
		m[name] = time.Duration(sec)*time.Second + time.Duration(nsec)
	}
	return m, nil
}
