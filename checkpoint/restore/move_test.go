package restore

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
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
			b := make([]byte, r.Bytes())
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
// demand and, once fill is closed, all the rest.
type server struct {
	sn   *snapshot
	uffd *os.File
	fill chan struct{}
	done chan error // closed when every page is there

	segs   []segment    // of run
	faults atomic.Int64 // with content
	eager  uint64       // pages
}

// segment is content and where it belongs now.
type segment struct {
	page.Range
	b []byte
}

func serve(sn *snapshot) *server {
	return &server{sn: sn, fill: make(chan struct{}), done: make(chan error, 1)}
}

func (s *server) Adopt(_ context.Context, a Adoption) error {
	defer a.Mem.Close()
	for i, r := range s.sn.ranges {
		part := func(x page.Range) []byte { return s.sn.content[i][x.Start-r.Start : x.End-r.Start] }
		for _, x := range a.Memory.Eager.Intersect(r) {
			s.eager += uint64(x.Pages())
			if i := slices.IndexFunc(a.Regions, func(g Region) bool { return g.Contains(x.Start) }); a.Regions[i].Kind == RegionUFFD {
				if n, err := sys.UffdCopy(int(a.UFFD.Fd()), uint64(x.Start), part(x), 0); err != nil || n != int64(x.Bytes()) {
					return fmt.Errorf("eager pages %v: %d, %w", x, n, err)
				}
				continue
			}
			if _, err := a.Mem.WriteAt(part(x), int64(x.Start)); err != nil {
				return fmt.Errorf("eager pages %v: %w", x, err)
			}
		}
		for _, x := range a.Memory.Lazy.Intersect(r) {
			s.segs = append(s.segs, segment{x, part(x)})
		}
	}
	if a.UFFD == nil {
		close(s.done)
		return nil
	}
	s.uffd = a.UFFD
	go func() {
		defer close(s.done)
		defer s.uffd.Close()
		if err := s.run(int(s.uffd.Fd())); err != nil {
			s.done <- err
		}
	}()
	return nil
}

func (s *server) WaitEager(context.Context) error { return nil }

// run answers faults and events, and fills in between.
func (s *server) run(fd int) error {
	buf := make([]byte, 64*sys.UffdMsgSize)
	fill := false
	for {
		timeout := 20
		select {
		case <-s.fill:
			fill, timeout = true, 0
		default:
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, timeout); err != nil && err != unix.EINTR {
			return err
		}
		n, err := unix.Read(fd, buf)
		if err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return err
		}
		for _, m := range sys.DecodeUffdMsgs(buf[:max(n, 0)], nil) {
			if err := s.event(fd, m); err != nil {
				return err
			}
		}
		if !fill {
			continue
		}
		if len(s.segs) == 0 {
			return nil
		}
		r := page.PageOf(s.segs[0].Start)
		switch err := s.place(fd, r); err {
		case nil:
			s.cut(r)
		case unix.EAGAIN: // an event waits to be read
		default:
			return err
		}
	}
}

func (s *server) event(fd int, m sys.UffdMsg) error {
	switch m.Event {
	case sys.UffdEventPagefault:
		r := page.PageOf(page.Addr(m.Addr))
		// On EAGAIN it faults again when it is woken.
		if err := s.place(fd, r); err != nil && err != unix.EAGAIN {
			return err
		}
		return settled(sys.UffdWake(fd, uint64(r.Start), page.Size))
	case sys.UffdEventRemove, sys.UffdEventUnmap:
		s.cut(page.Range{Start: page.Addr(m.Start), End: page.Addr(m.End)})
	case sys.UffdEventRemap:
		for _, g := range s.cut(page.Range{Start: page.Addr(m.From), End: page.Addr(m.From + m.Len)}) {
			g.Start, g.End = g.Start-page.Addr(m.From)+page.Addr(m.To), g.End-page.Addr(m.From)+page.Addr(m.To)
			s.segs = append(s.segs, g)
		}
	case sys.UffdEventFork:
		return unix.Close(m.ForkFD)
	}
	return nil
}

// cut takes r out of what is to be placed and returns what was there.
func (s *server) cut(r page.Range) (out []segment) {
	var keep []segment
	for _, g := range s.segs {
		x := g.Intersect(r)
		if x.Empty() {
			keep = append(keep, g)
			continue
		}
		part := func(a, b page.Addr) segment {
			return segment{page.Range{Start: a, End: b}, g.b[a-g.Start : b-g.Start]}
		}
		out = append(out, part(x.Start, x.End))
		if g.Start < x.Start {
			keep = append(keep, part(g.Start, x.Start))
		}
		if x.End < g.End {
			keep = append(keep, part(x.End, g.End))
		}
	}
	s.segs = keep
	return out
}

// place puts one page in place, zeros where there is no content.
func (s *server) place(fd int, r page.Range) error {
	for _, g := range s.segs {
		if g.Contains(r.Start) {
			_, err := sys.UffdCopy(fd, uint64(r.Start), g.b[r.Start-g.Start:][:page.Size], 0)
			s.faults.Add(1)
			return settled(err)
		}
	}
	_, err := sys.UffdZeropage(fd, uint64(r.Start), page.Size, 0)
	return settled(err)
}

// settled lets pass what means that the page is there, or not wanted any more.
func settled(err error) error {
	switch err {
	case unix.EEXIST, unix.ENOENT, unix.ESRCH, unix.EINVAL:
		return nil
	}
	return err
}

// resident waits until every page is there.
func (s *server) resident(t *testing.T) {
	t.Helper()
	close(s.fill)
	select {
	case err := <-s.done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(limit):
		t.Fatal("the pages do not come to an end")
	}
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
	trap := serve(sn)
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
