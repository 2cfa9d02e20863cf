package proc

import (
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testutil.Main(m) }

const smaps = `55ac31c69000-55ac31c6b000 r--p 00000000 fe:00 247766                     /usr/bin/with space
Size:                  8 kB
Rss:                   8 kB
VmFlags: rd mr mw me sd
7ffe00000000-7ffe00001000 rw-s 00001000 00:01 1027                       /memfd:a b (deleted) (deleted)
VmFlags: rd wr sh mr mw me ms sd
7ffe70cba000-7ffe70cdb000 rw-p 00000000 00:00 0                          [stack]
VmFlags: rd wr mr mw me gd ac
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
`

func TestParseMaps(t *testing.T) {
	ms, err := ParseMaps([]byte(smaps))
	if err != nil || len(ms) != 4 {
		t.Fatal(ms, err)
	}
	a, b, c := ms[0], ms[1], ms[2]
	if a.Start != 0x55ac31c69000 || a.Prot != unix.PROT_READ || a.Shared || a.Ino != 247766 || a.Dev != unix.Mkdev(0xfe, 0) ||
		a.Name != "/usr/bin/with space" || a.Deleted || !a.Has("sd") || a.Has("wr") {
		t.Errorf("%+v", a)
	}
	if !b.Shared || b.Offset != 0x1000 || b.Name != "/memfd:a b (deleted)" || !b.Deleted || !b.Has("ms") {
		t.Errorf("%+v", b)
	}
	if c.Name != "[stack]" || !c.Has("gd") || c.Prot != unix.PROT_READ|unix.PROT_WRITE {
		t.Errorf("%+v", c)
	}
	for _, bad := range []string{"1000-2000 r--p 0 0:0", "2000-1000 r--p 0 00:00 0", "1001-2000 r--p 0 00:00 0", "1000-2000 r-p 0 00:00 0"} {
		if ms, err := ParseMaps([]byte(bad)); err == nil {
			t.Errorf("%q parsed as %+v", bad, ms)
		}
	}
}

// A file that was read while the process changed its mappings.
func TestParseMapsThatOverlap(t *testing.T) {
	ms, err := ParseMaps([]byte("1000-5000 rw-p 0 00:00 0\n3000-9000 rw-p 0 00:00 0\n3000-7000 rw-p 0 00:00 0\n"))
	want := []page.Range{{Start: 0x1000, End: 0x3000}, {Start: 0x3000, End: 0x7000}}
	if err != nil || len(ms) != 2 || ms[0].Range != want[0] || ms[1].Range != want[1] {
		t.Errorf("%+v, %v", ms, err)
	}
}

func TestParseTimers(t *testing.T) {
	ts, err := ParseTimers([]byte("ID: 3\nsignal: 14/00007ffe12345678\nnotify: signal/tid.1234\nClockID: 1\nID: 4\nsignal: 0/(null)\n"))
	if err == nil {
		t.Errorf("a value that is none parsed: %+v", ts)
	}
	ts, err = ParseTimers([]byte("ID: 3\nsignal: 14/00007ffe12345678\nnotify: signal/tid.1234\nClockID: -6\n"))
	if err != nil || len(ts) != 1 || ts[0] != (Timer{ID: 3, Signal: 14, Value: 0x7ffe12345678, Notify: "signal", Thread: true, PID: 1234, Clock: -6}) {
		t.Errorf("%+v, %v", ts, err)
	}
}

func TestOwnFiles(t *testing.T) {
	pid := os.Getpid()
	st, err := ReadStat(pid)
	if err != nil || st.PID != pid || st.PPID != os.Getppid() || st.StartTime == 0 || st.StartStack == 0 || st.KernelThread() {
		t.Errorf("%+v, %v", st, err)
	}
	s, err := ReadStatus(pid)
	if err != nil || s.TGID != pid || s.UID[1] != uint32(os.Geteuid()) || !s.HasMM || s.Threads < 1 || s.SigCaught == 0 ||
		len(s.NSPID) == 0 || s.NSPID[0] != pid {
		t.Errorf("%+v, %v", s, err)
	}
	tids, err := Threads(pid)
	if err != nil || !slices.Contains(tids, pid) {
		t.Errorf("%v, %v", tids, err)
	}
	auxv, err := Auxv(pid)
	const atPageSize = 6
	if v, ok := AuxvEntry(auxv, atPageSize); err != nil || !ok || v != page.Size {
		t.Errorf("page size %d %v, %v", v, ok, err)
	}
	if n, err := Int(pid, "oom_score_adj"); err != nil || n < -1000 || n > 1000 {
		t.Errorf("oom_score_adj %d, %v", n, err)
	}
	if exe, err := Link(pid, "exe"); err != nil || exe == "" {
		t.Errorf("exe %q, %v", exe, err)
	}
	if _, ok, err := CgroupV2(pid); err != nil {
		t.Errorf("cgroup %v, %v", ok, err)
	}
}

func read1(f *testing.F, name string) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(os.Getpid()) + "/" + name)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
}

func FuzzMaps(f *testing.F) {
	f.Add([]byte(smaps))
	read1(f, "smaps")
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := ParseMaps(b)
		if err != nil {
			return
		}
		for i, m := range ms {
			if m.Empty() || !m.Aligned() || i > 0 && m.Start < ms[i-1].End {
				t.Fatalf("mapping %d of %+v", i, ms)
			}
		}
	})
}

func FuzzStat(f *testing.F) {
	read1(f, "stat")
	f.Add([]byte("1 (a) b) S 1 1 1"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseStat(b) })
}

func FuzzStatus(f *testing.F) {
	read1(f, "status")
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseStatus(b) })
}

func FuzzTimers(f *testing.F) {
	f.Add([]byte("ID: 3\nsignal: 14/00007ffe12345678\nnotify: signal/tid.1234\nClockID: 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = ParseTimers(b) })
}
