package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// snapshot is a frozen process taken away whole: image and content.
type snapshot struct {
	img     *image.Image
	mem     []image.Memory
	ranges  []page.Range // with content, lazy ones first
	content [][]byte
}

func inVDSO(img *image.Image) bool {
	p := &img.Processes[0]
	return slices.ContainsFunc(p.VMAs, func(v image.VMA) bool {
		return v.Kind == image.VMAVDSO && slices.ContainsFunc(p.Threads, func(t image.Thread) bool { return v.Contains(page.Addr(t.Regs.RIP)) })
	})
}

// take captures a process, reads all its pages and ends it.
func take(t *testing.T, p *testutil.Process) *snapshot {
	t.Helper()
	return takeWith(t, p, func(*checkpoint.Session, *image.Image) {})
}

// takeWith calls look with the process frozen.
func takeWith(t *testing.T, p *testutil.Process, look func(*checkpoint.Session, *image.Image)) *snapshot {
	t.Helper()
	ctx := timed(t)
	s, err := checkpoint.Open(p.Pid(), checkpoint.Options{TCPClose: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var img *image.Image
	var mem []image.Memory
	for img == nil || inVDSO(img) { // a test may force another vdso on it
		if err := s.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
		if err := s.Survey(); err != nil {
			t.Fatal(err)
		}
		if err := s.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if img, mem, err = s.Capture(ctx); err != nil {
			t.Fatal(err)
		}
	}
	// What travels is the encoded form.
	b, err := image.Encode(img)
	if err != nil {
		t.Fatal(err)
	}
	sn := &snapshot{mem: mem}
	if sn.img, err = image.Decode(b); err != nil {
		t.Fatal(err)
	}
	for _, set := range []*page.Set{&mem[0].Lazy, &mem[0].Eager} {
		for _, r := range set.Ranges() {
			b, err := unix.Mmap(-1, 0, int(r.Bytes()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Munmap(b) })
			if err := s.ReadPages(0, []page.Range{r}, b); err != nil {
				t.Fatal(err)
			}
			sn.ranges, sn.content = append(sn.ranges, r), append(sn.content, b)
		}
	}
	look(s, img)
	if err := s.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	// Its number is free when it was reaped, by whoever that falls to.
	testutil.Eventually(t, 4*limit, func() error {
		if err := unix.Kill(p.Pid(), 0); err != unix.ESRCH {
			return fmt.Errorf("pid %d is still there: %v", p.Pid(), err)
		}
		return nil
	})
	return sn
}

// server is a Trap that serves a snapshot: eager pages at once, the others on
// demand and, once fill is closed, all the rest. What the events of a userfaultfd mean is
// not for a test to say: the one that the pager has is behind it.
type server struct {
	sn   *snapshot
	st   *pagestore.Store
	trap *fault.Trap
	done chan error // of the goroutines that serve

	faults atomic.Int64 // with content
	eager  uint64       // pages
}

func serve(t *testing.T, sn *snapshot) *server {
	s := &server{sn: sn, done: make(chan error, 2)}
	t.Cleanup(func() {
		if err := s.end(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *server) Adopt(_ context.Context, a Adoption) (err error) {
	if s.st, err = pagestore.Create("test"); err != nil {
		return err
	}
	src, err := s.st.AddSource(a.Memory.Space, a.Memory.Lazy, a.Memory.Eager, page.Set{})
	if err != nil {
		return err
	}
	var segs []pagestore.Segment
	for _, r := range a.Regions {
		g := pagestore.Segment{Dst: r.Range, Src: r.Start}
		if r.Kind != RegionUFFD {
			g.Flags |= pagestore.Written
		}
		if r.Shared {
			g.Flags |= pagestore.Shared
		}
		segs = append(segs, g)
	}
	fds := []int{-1, -1}
	for i, f := range []*os.File{a.UFFD, a.Mem} {
		if f == nil {
			continue
		}
		// Its number is the trap's, which closes it.
		if fds[i], err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, fault.FirstFD); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	if a.UFFD != nil {
		if err := unix.SetNonblock(fds[0], true); err != nil {
			return err
		}
	}
	if _, err := s.st.AddSpace(src, a.PID, fds[0], fds[1], segs); err != nil {
		return err
	}
	asked := make(chan page.Num, 1<<20)
	s.trap, err = fault.New(fault.Config{Store: s.st, Request: func(_ page.Space, pages []page.Num) {
		for _, n := range pages {
			asked <- n
		}
	}})
	if err != nil {
		return err
	}
	for _, r := range a.Memory.Eager.Ranges() {
		s.eager += uint64(r.Pages())
		if err := s.place(r); err != nil {
			return fmt.Errorf("eager pages %v: %w", r, err)
		}
	}
	go func() {
		s.done <- s.trap.Run()
		close(asked)
	}()
	go func() {
		var failed error
		for n := range asked {
			s.faults.Add(1)
			failed = errors.Join(failed, s.place(page.PageOf(n.Addr())))
		}
		s.done <- failed
	}()
	return nil
}

func (s *server) WaitEager(context.Context) error { return nil }

// place puts r in place, where it is missing. What had landed before is not the trap's.
func (s *server) place(r page.Range) (err error) {
	id := s.sn.mem[0].Space
	for i, c := range s.sn.ranges {
		s.st.Source(id).Each(c.Intersect(r), func(x page.Range, _ int) {
			_, e := s.trap.Place(id, x, s.sn.content[i][x.Start-c.Start:x.End-c.Start])
			err = errors.Join(err, e)
		})
	}
	return err
}

// resident waits until every page is there, and ends the trap.
func (s *server) resident(t *testing.T) {
	t.Helper()
	for _, r := range s.sn.ranges {
		if err := s.place(r); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.st.Missing(true); n != 0 {
		t.Errorf("%d pages do not come", n)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
}

// end ends the trap. What is still missing will be zero. Idempotent.
func (s *server) end() (err error) {
	if s.trap == nil {
		return nil
	}
	s.trap.Halt()
	for range 2 {
		err = errors.Join(err, <-s.done)
	}
	if s.st.Missing(true) == 0 {
		err = errors.Join(err, s.trap.Leave())
	}
	for _, sp := range s.st.Spaces() {
		fd, mem := sp.Gone()
		for _, fd := range []int{fd, mem} {
			if fd >= 0 {
				err = errors.Join(err, unix.Close(fd))
			}
		}
	}
	err = errors.Join(err, s.trap.Close(), s.st.Close())
	s.trap = nil
	return err
}

// move takes a program away and makes it anew. It returns the trap, which still
// has every lazy page that the program did not ask for.
func move(t *testing.T, p *testutil.Process, adapt func(*Config)) *server {
	t.Helper()
	return moveLaid(t, p, adapt, nil)
}

// moveLaid calls land with the skeleton before it is rebuilt.
func moveLaid(t *testing.T, p *testutil.Process, adapt func(*Config), land func(*Skeleton, *snapshot)) *server {
	t.Helper()
	cfg := config(t)
	if adapt != nil {
		adapt(&cfg)
	}
	sn := take(t, p)
	ctx := timed(t) // from here: the former process may have been slow to be reaped
	trap := serve(t, sn)
	steps := map[string]time.Time{}
	cfg.KillPoint = func(name string) { steps[name] = time.Now() }
	if land != nil {
		cfg.PID, cfg.PGID, cfg.SID = sn.img.Processes[0].PID, sn.img.Processes[0].PGID, sn.img.Processes[0].SID
		cfg.Monotonic, cfg.Boottime = sn.img.Monotonic, sn.img.Boottime
	}
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if land != nil {
		land(s, sn)
	}
	begin := time.Now()
	if err := s.Rebuild(ctx, sn.img, sn.mem, trap); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(begin)
	if err := s.Park(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(ctx); err != nil {
		t.Fatal(err)
	}
	p.Moved(s.PID())
	t.Cleanup(p.Kill) // before its cgroup is removed
	t.Logf("%d threads, %d mappings, %d descriptors, %d KiB: rebuilt in %v, running after %v", len(sn.img.Processes[0].Threads),
		len(sn.img.Processes[0].VMAs), len(sn.img.Processes[0].FDs), (sn.mem[0].Lazy.Bytes()+sn.mem[0].Eager.Bytes())>>10, whole, time.Since(begin))
	for _, step := range []string{"check", "threads", "layout", "mappings", "trap", "descriptors", "process", "thread state", "memory", "registers"} {
		t.Logf("  %-13s %v", step, steps["restore/"+step+"/after"].Sub(steps["restore/"+step+"/before"]))
	}
	return trap
}
