package sys

import (
	"os"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDescriptorStructs(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"struct kcmp_epoll_slot", reflect.TypeOf(KcmpEpollSlot{}).Size(), 12},
		{"struct f_owner_ex", reflect.TypeOf(FOwnerEx{}).Size(), 8},
		{"struct group_filter without sources", reflect.TypeOf(groupFilter{}).Size(), 144},
		{"TFD_IOC_SET_TICKS", IOW('T', 0, 8), 0x40085400},
		{"INOTIFY_IOC_SETNEXTWD", IOW('I', 0, 4), 0x40044900},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, not %#x", c.name, c.got, c.want)
		}
	}
}

func TestKcmp(t *testing.T) {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := int(f.Fd())
	b, err := unix.Dup(a)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(b)
	g, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	me := os.Getpid()
	if c, err := Kcmp(me, me, KCMP_FILE, uint64(a), uint64(b)); c != 0 || err != nil {
		t.Errorf("a duplicate: %d, %v", c, err)
	}
	c, err := Kcmp(me, me, KCMP_FILE, uint64(a), uint64(g.Fd()))
	d, err2 := Kcmp(me, me, KCMP_FILE, uint64(g.Fd()), uint64(a))
	if err != nil || err2 != nil || c == 0 || c != -d {
		t.Errorf("another open file: %d and %d, %v, %v", c, d, err, err2)
	}
}
