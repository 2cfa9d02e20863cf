package fds

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

func TestParseFDInfo(t *testing.T) {
	for _, c := range []struct {
		text string
		want fdInfo
	}{
		{"pos:\t5\nflags:\t02100002\nmnt_id:\t27\nino:\t9\n", fdInfo{Pos: 5, Flags: 0o2100002, Mount: 27, Ino: 9}},
		{"flags:\t02\neventfd-count:                7\neventfd-id: 3\neventfd-semaphore: 1\n",
			fdInfo{Flags: 2, EventCount: 7, Semaphore: true}},
		{"clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (3597, 982757392)\nit_interval: (5, 6)\n",
			fdInfo{Clock: 1, Ticks: 3, SetFlags: 1, Value: 3597982757392, Interval: 5000000006}},
		{"sigmask:\t0000000000000800\n", fdInfo{SigMask: 0x800}},
		{"tfd:       25 events: 40000019 data:             3333  pos:0 ino:40f sdev:10\n",
			fdInfo{Epoll: []epollInfo{{FD: 25, Events: 0x40000019, Data: 0x3333, Ino: 0x40f, Dev: unix.Mkdev(0, 16)}}}},
		{"inotify wd:3 ino:f sdev:fe00000 mask:300 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7664\n",
			fdInfo{Watches: []watchInfo{{WD: 3, Ino: 15, Dev: unix.Mkdev(254, 0), Mask: 0x300, HandleType: 1, Handle: []byte{0x76, 0x64}}}}},
		{"lock:\t1: POSIX  ADVISORY  WRITE 30735 fe:00:9978188 10 19\nlock:\t2: FLOCK  ADVISORY  READ 1 fe:00:1 0 EOF\n",
			fdInfo{Locks: []lockInfo{
				{image.Lock{Kind: "POSIX", Write: true, Start: 10, Len: 10}, "POSIX"},
				{image.Lock{Kind: "FLOCK"}, "FLOCK"},
			}}},
		{"scm_fds: 2\nPid:\t-1\nunknown line\nother: 1\n", fdInfo{SCM: 2, Pid: -1}},
	} {
		got, err := parseFDInfo([]byte(c.text))
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q\nis  %+v (%v)\nnot %+v", c.text, got, err, c.want)
		}
	}
	for _, bad := range []string{"pos:\tx\n", "flags:\t9\n", "it_value: (1)\n", "it_value: (9223372037, 0)\n",
		"tfd: 5\n", "tfd: 5 events: 1 data\n", "inotify wd:0\n", "inotify what\n", "lock:\t1: POSIX\n",
		"lock:\t1: POSIX ADVISORY WRITE 1 0:0:0 20 10\n", "lock:\t1: POSIX ADVISORY WRITE 1 0:0:0 -5 10\n"} {
		if in, err := parseFDInfo([]byte(bad)); err == nil {
			t.Errorf("%q was taken for %+v", bad, in)
		}
	}
}

func FuzzFDInfo(f *testing.F) {
	for _, s := range []string{
		"pos:\t0\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 30735 fe:00:9978188 10 19\n",
		"tfd:       25 events: 40000019 data:             3333  pos:0 ino:40f sdev:10\n",
		"inotify wd:3 ino:f sdev:fe00000 mask:300 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7664\n",
		"clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (3597, 982757392)\nit_interval: (5, 6)\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := parseFDInfo(b)
		if err == nil && (in.Value < 0 || in.Interval < 0) {
			t.Errorf("negative time in %+v", in)
		}
		for _, l := range in.Locks {
			if l.Len < 0 || l.Start < 0 {
				t.Errorf("lock %+v", l)
			}
		}
		parseMounts(string(b))
		parseIGMP(string(b))
		parseIGMP6(string(b))
		procPath(string(b))
	})
}

func FuzzAddress(f *testing.F) {
	f.Add([]byte{2, 0, 0, 80, 127, 0, 0, 1}, "127.0.0.1", "10.0.0.1:5")
	f.Add([]byte{1, 0, 0, 'x'}, "", "")
	f.Fuzz(func(t *testing.T, raw []byte, from, to string) {
		addrString(raw)
		out, err := translate(raw, map[string]string{from: to})
		if err == nil && len(out) != len(raw) {
			t.Errorf("%x became %x", raw, out)
		}
		_, _ = wildcard(raw)
	})
}

func TestTranslate(t *testing.T) {
	v4 := []byte{2, 0, 0x18, 0xeb, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}
	mapped := append([]byte{10, 0, 0x18, 0xeb, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1}, 0, 0, 0, 0)
	for _, c := range []struct {
		raw      []byte
		old, new string
		want     string
	}{
		{v4, "10.0.0.1", "10.0.0.2", "10.0.0.2:6379"},
		{v4, "10.0.0.1:6379", "10.0.0.2:7", "10.0.0.2:7"},
		{v4, "10.0.0.1:6380", "10.0.0.2:7", "10.0.0.1:6379"},
		{v4, "10.0.0.9", "10.0.0.2", "10.0.0.1:6379"},
		{mapped, "10.0.0.1", "10.0.0.2", "10.0.0.2:6379"},
		{v4, "10.0.0.1", "::1", "error"},
		{v4, "10.0.0.1", "nonsense", "error"},
	} {
		before := bytes.Clone(c.raw)
		got, err := translate(c.raw, map[string]string{c.old: c.new})
		s := addrString(got)
		if err != nil {
			s = "error"
		}
		if s != c.want {
			t.Errorf("%s=%s gives %s (%v), not %s", c.old, c.new, s, err, c.want)
		}
		if !bytes.Equal(before, c.raw) {
			t.Error("the address given was changed")
		}
	}
}

func TestMountsAndGroups(t *testing.T) {
	got := parseMounts("27 1 254:0 / / rw - ext4 /dev/x rw\n28 27 0:5 / /mnt/with\\040space rw\nshort\n1 2 x:y / / rw\n")
	want := []mount{{unix.Mkdev(254, 0), "/"}, {unix.Mkdev(0, 5), "/mnt/with space"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if g := parseIGMP("Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n2\teth0      :     1      V3\n\t\t\t\t0302EFEF     1 0:00000000\t\t0\n"); len(g) != 1 || g[0].index != 2 || g[0].addr.String() != "239.239.2.3" {
		t.Errorf("%+v", g)
	}
	if g := parseIGMP6("1    lo              ff020000000000000000000000000001     1 0000000C 0\nbad\n"); len(g) != 1 || g[0].addr.String() != "ff02::1" {
		t.Errorf("%+v", g)
	}
}

func TestProcPath(t *testing.T) {
	for s, want := range map[string]string{
		"/proc/12/status": "12 /status true", "/proc/12": "12  true", "/proc/self/status": "0  false",
		"/proc/": "0  false", "/proc/meminfo": "0  false", "/procs/12/x": "0  false", "/proc/99999999999999/x": "0  false",
	} {
		pid, rest, ok := procPath(s)
		if got := fmt.Sprint(pid, " ", rest, " ", ok); got != want {
			t.Errorf("%s: %q instead of %q", s, got, want)
		}
	}
}
