package onesided_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

func TestInGuest(t *testing.T) {
	testutil.NoLeaks(t)
	pinned(t) // a compiler is slow in the guest
	vmtest.Run(t, 4*time.Minute, func(t *testing.T) {
		vmtest.Pair(t)
		for _, c := range []struct {
			name string
			test func(t *testing.T)
		}{
			{"Redis", testRedis},
			{"Kinds", testKinds},
			{"Most", testMost},
			{"User", testUser},
			{"Seccomp", testSeccomp},
			{"Refused", testRefused},
			{"State", testState},
			{"Ended", testEnded},
			{"EndedUnheard", testEndedUnheard},
			{"Again", testAgain},
			{"Cost", testCost},
		} {
			t.Run(c.name, c.test)
		}
	})
}

// A real program: all of its memory, byte for byte, and it goes on.
func testRedis(t *testing.T) {
	testutil.NoLeaks(t)
	server := testutil.Redis(t)
	server.Populate(3000, 16<<10)
	digest := server.Digest()
	r := newRig(t)
	pid := server.Pid()
	before, rss := outside(t, pid), kilobytes(t, pid, "VmRSS")
	s := freeze(t, pid)
	began := time.Now()
	reg, err := register(t.Context(), s, r.source)
	took := time.Since(began)
	if err != nil {
		t.Fatal(err)
	}
	regions := r.adopt(reg)
	bytes := r.compare(reg, readOf(s))
	t.Logf("%d MiB in %d regions registered in %v, %v left", bytes>>20, len(regions), took, reg.Left.Bytes()>>10)
	if bytes < 40<<20 || len(reg.Refused) > 0 {
		t.Errorf("%d bytes registered; refused: %v", bytes, reg.Refused)
	}
	if pin := kilobytes(t, pid, "VmPin"); pin != bytes>>10 {
		t.Errorf("%d KiB are pinned of %d registered", pin, bytes>>10)
	}
	if now := kilobytes(t, pid, "VmRSS"); now > rss+64 {
		t.Errorf("it has %d KiB, it had %d", now, rss)
	}
	for _, g := range regions {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	if now := outside(t, pid); now != before {
		t.Errorf("it was\n%s\nand is\n%s", before, now)
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := server.Digest(); now != digest {
		t.Errorf("digest %s, it was %s", now, digest)
	}
}

// What is there becomes part of a region, and what would take memory does not.
func testKinds(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil)
	r := newRig(t)
	s := freeze(t, p.Pid())
	rss := kilobytes(t, p.Pid(), "VmRSS")
	reg, err := register(t.Context(), s, r.source)
	if err != nil {
		t.Fatal(err)
	}
	r.adopt(reg)
	r.compare(reg, readOf(s))
	if now := kilobytes(t, p.Pid(), "VmRSS"); now > rss+64 {
		t.Errorf("it has %d KiB, it had %d", now, rss)
	}
	var got page.Set
	for _, e := range reg.Regions {
		got.Add(e.Range)
	}
	for name, want := range map[string]uint64{"anon": 8 << 20, "holes": 64 * 64 << 10, "readonly": 1 << 20, "shared": 2 << 20,
		"zero": 0, "none": 0, "shared-by-fork": 0} {
		a := p.areas[name]
		if n := got.BytesIn(a); n != want {
			t.Errorf("%d bytes of %s are registered, not %d", n, name, want)
		}
		if n := reg.Left.BytesIn(a); n != a.Bytes()-want {
			t.Errorf("%d bytes of %s are left, not %d", n, name, a.Bytes()-want)
		}
	}
	if len(reg.Refused) > 0 {
		t.Errorf("refused: %v", reg.Refused)
	}
	if err := r.source.Close(); err != nil { // with all regions
		t.Error(err)
	}
	if pin := kilobytes(t, p.Pid(), "VmPin"); pin != 0 {
		t.Errorf("%d KiB are still pinned", pin)
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.verify()
}

// Of more runs of pages than there may be regions the longest are taken.
func testMost(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil)
	r := newRig(t)
	s := freeze(t, p.Pid())
	l, err := r.source.Lend()
	if err != nil {
		t.Fatal(err)
	}
	pages := page.NewSet(p.areas["anon"], p.areas["holes"], p.areas["readonly"])
	reg, err := s.Register(t.Context(), checkpoint.Domain{File: l.File, Driver: l.Driver, ID: l.Domain, MaxRegions: 2}, pages)
	if err := errors.Join(err, l.File.Close()); err != nil {
		t.Fatal(err)
	}
	r.adopt(reg)
	r.compare(reg, readOf(s))
	var got page.Set
	for _, e := range reg.Regions {
		got.Add(e.Range)
	}
	if len(reg.Regions) != 2 || !got.Covers(p.areas["anon"]) || !got.Covers(p.areas["readonly"]) && got.Bytes() < 9<<20 {
		t.Errorf("registered %v", reg.Regions)
	}
	if reg.Left.Bytes()+got.Bytes() != pages.Bytes() {
		t.Errorf("%d bytes left and %d registered of %d", reg.Left.Bytes(), got.Bytes(), pages.Bytes())
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.verify()
}

// A process of another user that may lock no memory and is not let to the device.
func testUser(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "--threads", "20")
	for _, limit := range []unix.Rlimit{{Cur: 0, Max: 0}, {Cur: 4096, Max: 1 << 20}} {
		r := newRig(t)
		if err := unix.Prlimit(p.Pid(), unix.RLIMIT_MEMLOCK, &limit, nil); err != nil {
			t.Fatal(err)
		}
		s := freeze(t, p.Pid())
		before := outside(t, p.Pid())
		reg, err := register(t.Context(), s, r.source)
		if err != nil {
			t.Fatal(err)
		}
		regions := r.adopt(reg)
		if n := r.compare(reg, readOf(s)); n < 15<<20 || len(reg.Refused) > 0 {
			t.Errorf("%d bytes registered; refused: %v", n, reg.Refused)
		}
		for _, g := range regions {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
		if now := outside(t, p.Pid()); now != before {
			t.Errorf("it was\n%s\nand is\n%s", before, now)
		}
		if err := s.Thaw(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.verify()
	}
}

// A seccomp filter would judge the calls: it is an error, and nothing is touched.
func testSeccomp(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil, "--seccomp")
	r := newRig(t)
	s := freeze(t, p.Pid())
	before := outside(t, p.Pid())
	reg, err := register(t.Context(), s, r.source)
	if !errors.Is(err, inject.ErrSeccomp) || len(reg.Regions) > 0 {
		t.Errorf("registered %v: %v", reg.Regions, err)
	}
	if now := outside(t, p.Pid()); now != before {
		t.Errorf("it was\n%s\nand is\n%s", before, now)
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.verify()
}

// What the kernel does not take is named, range by range, and the process is whole.
func testRefused(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil)
	r := newRig(t)
	s := freeze(t, p.Pid())
	before := outside(t, p.Pid())
	l, err := r.source.Lend()
	if err != nil {
		t.Fatal(err)
	}
	defer l.File.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	pages := page.NewSet(p.areas["anon"])
	for name, c := range map[string]struct {
		d    checkpoint.Domain
		want error
	}{
		"no such domain": {checkpoint.Domain{File: l.File, Driver: l.Driver, ID: l.Domain + 1000}, unix.ENOENT},
		"other driver":   {checkpoint.Domain{File: l.File, Driver: l.Driver + 1, ID: l.Domain}, unix.EINVAL},
		"no device":      {checkpoint.Domain{File: null, Driver: l.Driver, ID: l.Domain}, unix.ENOTTY},
	} {
		reg, err := s.Register(t.Context(), c.d, pages)
		if err != nil || len(reg.Regions) > 0 || len(reg.Refused) == 0 || !errors.Is(reg.Refused[0].Err, c.want) || reg.Left.Bytes() != pages.Bytes() {
			t.Errorf("%s: %+v, %v", name, reg, err)
		}
	}
	if now := outside(t, p.Pid()); now != before {
		t.Errorf("it was\n%s\nand is\n%s", before, now)
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Not frozen any more.
	if _, err := s.Register(t.Context(), checkpoint.Domain{File: l.File}, pages); !errors.Is(err, checkpoint.ErrState) {
		t.Errorf("of a running process: %v", err)
	}
	p.verify()
}

// Threads, mappings, signals and descriptors are the same in the image before and after.
func testState(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil, "--threads", "5")
	r := newRig(t)
	s := freeze(t, p.Pid())
	before, _, err := s.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	reg, err := register(t.Context(), s, r.source)
	if err != nil {
		t.Fatal(err)
	}
	r.adopt(reg)
	after, _, err := s.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range before.Processes[0].Threads {
		if b, a := before.Processes[0].Threads[i], after.Processes[0].Threads[i]; !reflect.DeepEqual(b, a) {
			t.Errorf("thread %d was\n%+v\nand is\n%+v", i, b, a)
		}
	}
	if b, a := before.Processes[0].VMAs, after.Processes[0].VMAs; !reflect.DeepEqual(b, a) {
		t.Errorf("mappings were\n%+v\nand are\n%+v", b, a)
	}
	if b, a := before.Files, after.Files; !reflect.DeepEqual(b, a) {
		t.Errorf("files were\n%+v\nand are\n%+v", b, a)
	}
	if err := errors.Join(s.Signaled(), r.source.Close(), s.Thaw(t.Context())); err != nil {
		t.Fatal(err)
	}
	p.verify()
}

// The process ends while its memory is registered: the peer reads on.
func testEnded(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil)
	r := newRig(t)
	s := freeze(t, p.Pid())
	reg, err := registerPages(t.Context(), s, r.source, page.NewSet(p.areas["anon"], p.areas["readonly"]))
	if err != nil {
		t.Fatal(err)
	}
	regions := r.adopt(reg)
	content := map[page.Range][]byte{}
	r.compare(reg, func(rg page.Range, buf []byte) error {
		err := s.ReadPages(0, []page.Range{rg}, buf)
		content[rg] = append([]byte(nil), buf...)
		return err
	})
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-p.Gone()
	r.compare(reg, func(rg page.Range, buf []byte) error { copy(buf, content[rg]); return nil })
	for _, g := range regions {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The process ends when it has registered and nobody knows the handles: those regions
// end with the device.
func testEndedUnheard(t *testing.T) {
	for _, point := range []string{"gate-running", "gate-ran"} {
		t.Run(point, func(t *testing.T) {
			testutil.NoLeaks(t)
			p := startPinned(t, nil)
			r := newRig(t)
			s := freeze(t, p.Pid())
			defer func() { inject.KillPoint = nil }()
			mrs := uint64(0)
			inject.KillPoint = func(name string) {
				if name == point {
					_ = unix.Kill(p.Pid(), unix.SIGKILL)
					testutil.Eventually(t, 10*time.Second, func() error {
						// Not its end: this is the thread that would have to wait for it.
						if maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.Pid())); err == nil && len(maps) > 0 {
							return errors.New("it still has memory")
						}
						return nil
					})
					mrs = resources(t, r.source.Path().Device)["mr"]
				}
			}
			before := resources(t, r.source.Path().Device)["mr"]
			if reg, err := register(t.Context(), s, r.source); !errors.Is(err, proc.ErrGone) {
				t.Errorf("registered %v, %v", reg.Regions, err)
			}
			if point == "gate-ran" && mrs <= before {
				t.Errorf("%d regions, there were %d: nothing is there to be ended", mrs, before)
			}
			if err := r.source.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Nothing is left on either side, however often it is done.
func testAgain(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil)
	r := newRig(t)
	device := r.source.Path().Device
	var before, fds string
	var regions uint64
	for i := range 20 {
		s := freeze(t, p.Pid())
		reg, err := register(t.Context(), s, r.source)
		if err != nil {
			t.Fatal(err)
		}
		adopted := r.adopt(reg)
		if n := kilobytes(t, p.Pid(), "VmPin"); n < 15<<10 {
			t.Fatalf("%d KiB are pinned", n)
		}
		for _, g := range adopted {
			if err := errors.Join(g.Close(), g.Close()); err != nil {
				t.Fatal(err)
			}
		}
		now, mrs, own := outside(t, p.Pid()), resources(t, device)["mr"], descriptors(t)
		if i == 0 {
			before, regions, fds = now, mrs, own
		}
		if now != before || mrs != regions || own != fds {
			t.Fatalf("round %d: %d regions on %s, there were %d; we have %s, had %s; the process was\n%s\nand is\n%s", i, mrs, device, regions, own, fds, before, now)
		}
		if err := errors.Join(s.Thaw(t.Context()), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	p.verify()
}

// What it costs, for whoever decides when to do it. In the guest only the ratio of the
// two means anything.
func testCost(t *testing.T) {
	testutil.NoLeaks(t)
	p := startPinned(t, nil, "--stripes", "16", "--bulk", "100", "--threads", "50")
	r := newRig(t)
	s := freeze(t, p.Pid())
	for _, c := range []struct {
		name    string
		pages   page.Set
		regions int
	}{
		{"a page, the first time", page.NewSet(page.PageOf(p.areas["bulk"].Start)), 1},
		{"a page", page.NewSet(page.PageOf(p.areas["bulk"].Start)), 1},
		{"100 MiB in one run", page.NewSet(p.areas["bulk"]), 1},
		{"2048 runs of a page", page.NewSet(p.areas["stripes"]), 2048},
	} {
		began := time.Now()
		reg, err := registerPages(t.Context(), s, r.source, c.pages)
		took := time.Since(began)
		if err != nil || len(reg.Regions) != c.regions {
			t.Fatalf("%s: %d regions, %v, %v", c.name, len(reg.Regions), reg.Refused, err)
		}
		regions := r.adopt(reg)
		began = time.Now()
		for _, g := range regions {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
		t.Logf("%s: registered in %v, deregistered in %v", c.name, took, time.Since(began))
	}
	if err := s.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.verify()
}

// descriptors are those of this program that are of devices or sockets.
func descriptors(t testing.TB) string {
	t.Helper()
	all, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]int{}
	for _, f := range all {
		to, _ := os.Readlink(f)
		if len(to) > 6 && (to[:5] == "/dev/" || to[:6] == "socket") {
			kinds[to[:6]]++
		}
	}
	return fmt.Sprint(kinds)
}
