package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// capture is one run of Capture.
type capture struct {
	s      *Session
	img    *image.Image
	p      *image.Process
	maps   []proc.Mapping
	status *proc.Status
	// objects are the shared memory objects that mappings show.
	objects  map[fds.FileKey]int
	data     [][]page.Range // of each object, where it has content beyond its chunks
	orphans  []page.Range   // private mappings of deleted files
	files    *mappedFiles
	refusals []string

	timers      []proc.Timer
	creds       []byte // of the main thread, as threadCalls asks for them
	interrupted []interrupted
}

func (c *capture) refuse(format string, a ...any) {
	c.refusals = append(c.refusals, fmt.Sprintf(format, a...))
}

// Capture is CaptureState with the rest joined to what it returned.
func (s *Session) Capture(ctx context.Context) (*image.Image, []image.Memory, error) {
	img, mem, rest, err := s.CaptureState(ctx)
	if err != nil {
		return nil, nil, err
	}
	more, err := rest()
	if err != nil {
		return nil, nil, err
	}
	return img, image.Join(mem, more), nil
}

// Rest waits for the part of the map of memory that takes time for each GiB. The
// process must stand still until it has returned. Call it once.
type Rest func() ([]image.Memory, error)

// CaptureState takes the state of a frozen process. When it returns, registers and
// masks are the program's own again, whatever the outcome; the threads stay
// stopped. Of the memory it returns what is outside ordinary anonymous mappings,
// whose page tables are still being walked: rest has those. A *RefusedError or
// *fds.RefusedError names what cannot be carried.
func (s *Session) CaptureState(ctx context.Context) (*image.Image, []image.Memory, Rest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img, mem, rest, err := s.capture(ctx)
	if err != nil {
		return nil, nil, nil, &Error{"capture", s.pid, err}
	}
	return img, mem, rest, nil
}

func (s *Session) capture(ctx context.Context) (_ *image.Image, _ []image.Memory, _ Rest, err error) {
	if err := s.usable(); err != nil {
		return nil, nil, nil, err
	}
	if len(s.threads) == 0 {
		return nil, nil, nil, fmt.Errorf("%w: not frozen", ErrState)
	}
	if s.isolated {
		if err := errors.Join(s.alone(), s.childless()); err != nil {
			return nil, nil, nil, err
		}
	}
	img := &image.Image{Created: time.Now(), Processes: make([]image.Process, 1)}
	c := &capture{s: s, img: img, p: &img.Processes[0]}
	if c.maps, err = s.survey.mappings(); err != nil {
		return nil, nil, nil, err
	}
	windows := c.startWindows()
	// The page tables are walked while the threads make their calls, those of
	// anonymous memory last.
	few, most := startScan(s.pid, c.maps, c.finder(windows))
	defer func() {
		if err != nil {
			_, _ = most.wait()
		}
	}()
	err = c.state()
	content, serr := few.wait()
	shown, werr := windows()
	if err = errors.Join(err, serr, werr); err != nil {
		return nil, nil, nil, err
	}
	c.listFiles()
	c.maps = append(c.maps, shown...)
	if err := c.mappings(); err != nil {
		return nil, nil, nil, err
	}
	if len(c.refusals) > 0 {
		return nil, nil, nil, &RefusedError{s.pid, c.refusals}
	}
	err = fds.Capture(ctx, &fds.CaptureContext{
		HostPID: s.pid, PIDFD: s.pidfd, Image: img, Process: c.p, Memories: c.objects,
		TCPClose: s.opt.TCPClose, Addresses: s.opt.Addresses, Log: s.log,
	})
	if err != nil {
		return nil, nil, nil, err
	}
	mem, err := c.memory(content)
	if err != nil {
		return nil, nil, nil, err
	}
	if len(c.refusals) > 0 {
		return nil, nil, nil, &RefusedError{s.pid, c.refusals}
	}
	c.takeSignals()
	rest := func() ([]image.Memory, error) {
		content, err := most.wait()
		if err != nil {
			return nil, &Error{"walk the page tables of", s.pid, err}
		}
		return []image.Memory{c.anonymous(content)}, nil
	}
	return img, []image.Memory{mem}, rest, nil
}

// state fills in what threads and process say of themselves.
func (c *capture) state() error {
	if err := c.outside(); err != nil {
		return err
	}
	var err error
	c.s.tr.Do(func() {
		if err = c.traced(); err == nil {
			err = c.injected()
		}
	})
	return err
}

// injected makes all threads tell what only they can, one batch for each, all
// at once. On the tracer's thread.
func (c *capture) injected() error {
	s := c.s
	leader := s.threads[0].tid
	t, err := inject.Bootstrap(s.tr, s.pid, leader)
	if err != nil {
		return err
	}
	process, decodeProcess := c.processBatch(t)
	jobs := []inject.Job{{TID: leader, Batch: process}}
	decode := make([]func() error, len(s.threads))
	for i, th := range s.threads {
		b := process
		if i > 0 {
			b = t.Batch()
			jobs = append(jobs, inject.Job{TID: th.tid, Batch: b})
		}
		decode[i] = c.threadCalls(b, i)
	}
	err = inject.RunAll(jobs)
	if err == nil {
		for i, th := range s.threads {
			how, mask, _ := t.Saved(th.tid)
			c.registers(&c.p.Threads[i], how, mask)
			err = errors.Join(err, decode[i]())
		}
		if err == nil {
			err = decodeProcess()
		}
		c.settle()
	}
	err = errors.Join(err, t.Close(leader))
	for _, th := range s.threads {
		th.deliver = t.Deliver(th.tid)
	}
	if sig := t.Stopped(); sig != 0 {
		s.stopSig = sig
	}
	inject.Point("captured")
	return err
}

// traced reads what ptrace tells, before anything runs in the threads.
func (c *capture) traced() error {
	s := c.s
	c.p.Threads = make([]image.Thread, len(s.threads))
	xstate := make([]byte, 16<<10)
	for i, th := range s.threads {
		t := &c.p.Threads[i]
		t.HostTID = th.tid
		n, err := sys.PtraceGetXState(th.tid, xstate)
		if err != nil {
			return gone(s.pid, fmt.Errorf("read the extended state of thread %d: %w", th.tid, err))
		}
		t.XState = append([]byte(nil), xstate[:n]...)
		pending, err := sys.PtracePeekSiginfo(th.tid, false)
		if err != nil {
			return gone(s.pid, fmt.Errorf("read the pending signals of thread %d: %w", th.tid, err))
		}
		t.Pending = siginfos(pending)
		r, err := sys.PtraceGetRseq(th.tid)
		if err != nil && !errors.Is(err, sys.ErrNotSupported) {
			return gone(s.pid, fmt.Errorf("read the rseq registration of thread %d: %w", th.tid, err))
		}
		t.Rseq = image.Rseq{Ptr: r.Pointer, Size: r.Size, Sig: r.Signature}
		sud, err := sys.PtraceGetSyscallUserDispatch(th.tid)
		if err == nil && sud.Mode != 0 {
			return &RefusedError{s.pid, []string{fmt.Sprintf("thread %d diverts its system calls (syscall user dispatch)", th.tid)}}
		}
	}
	shared, err := sys.PtracePeekSiginfo(s.threads[0].tid, true)
	if err != nil {
		return gone(s.pid, fmt.Errorf("read the pending signals: %w", err))
	}
	c.p.Pending = siginfos(shared)
	x := c.p.Threads[0].XState
	c.img.Host.XFeatures, c.img.Host.XSize = sys.XStateFeatures(x), uint32(len(x))
	return nil
}

func siginfos(in []sys.Siginfo) [][]byte {
	out := make([][]byte, len(in))
	for i := range in {
		out[i] = append([]byte(nil), in[i][:]...)
	}
	return out
}

func gone(pid int, err error) error { return proc.Gone(pid, err) }
