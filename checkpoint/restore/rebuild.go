package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// rebuild is the work on one process, from image to registers.
type rebuild struct {
	*Skeleton
	ctx  context.Context
	img  *image.Image
	p    *image.Process
	m    *image.Memory // without what rest will say, at first
	rest Rest
	trap Trap

	lastCap int
	regions []Region
	objects []*sharedObject
	pidfd   int
	mem     *os.File
	uffd    int // number in the process, -1 for none
	views   []View
	kept    page.Set // landed before, and right still
	veilFD  *os.File // until it is handed over
	exe     *fetched
}

// Rebuild makes the process of img. When it returns, the process is whole and
// stands still in the tracer's hands. mem says what content there is, by space;
// trap brings it. If it fails, nothing is left, as after Abort.
func (s *Skeleton) Rebuild(ctx context.Context, img *image.Image, mem []image.Memory, trap Trap) error {
	return s.RebuildWith(ctx, img, mem, nil, trap)
}

// Rest waits for what is known of the memory later than the image; see
// checkpoint.CaptureState. It is called once, with everything built that does not
// depend on it.
type Rest func(context.Context) ([]image.Memory, error)

// RebuildWith is Rebuild with a part of the map of memory that comes meanwhile:
// that of anonymous mappings. Nil where mem is all.
func (s *Skeleton) RebuildWith(ctx context.Context, img *image.Image, mem []image.Memory, rest Rest, trap Trap) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded {
		return fmt.Errorf("restore: rebuild of a skeleton that is %v: %w", s.state, ErrState)
	}
	// A call of the process that waits for a page that never comes ends with it.
	stop := context.AfterFunc(ctx, func() { _ = killAll(s.group) })
	defer stop()
	r := &rebuild{Skeleton: s, ctx: ctx, img: img, rest: rest, trap: trap, pidfd: -1, uffd: -1}
	defer r.close()
	if err := r.run(mem); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return errors.Join(err, s.abort(context.WithoutCancel(ctx)))
	}
	s.state = rebuilt
	return nil
}

// run goes through the steps. The order is that of what each one needs: numbers
// before anything is built on them, memory trapped before anything touches it,
// descriptors with all rights still there, credentials after everything that
// needs some, registers last.
func (r *rebuild) run(mem []image.Memory) error {
	if len(r.img.Processes) != 1 {
		return &Error{Step: "check", Err: fmt.Errorf("%w: %d processes", ErrUnsupported, len(r.img.Processes))}
	}
	r.p = &r.img.Processes[0]
	if err := r.content(mem); err != nil {
		return &Error{Step: "check", PID: r.p.PID, Err: err}
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"check", r.check},
		{"threads", r.threads},
		{"layout", r.layout},
		{"mappings", r.mappings},
		{"content", r.theRest},
		{"trap", r.adopt},
		{"descriptors", r.descriptors},
		{"process", r.process},
		{"thread state", r.threadState},
		{"memory", r.memory},
		{"registers", r.registers},
	} {
		if err := r.ctx.Err(); err != nil {
			return &Error{Step: step.name, PID: r.p.PID, Err: err}
		}
		r.cfg.KillPoint("restore/" + step.name + "/before")
		begin := time.Now()
		err := step.do()
		r.cfg.Log.Debug("rebuild", "step", step.name, "took", time.Since(begin))
		if err != nil {
			e := &Error{Step: step.name, PID: r.p.PID, Err: err}
			if o, ok := err.(*object); ok {
				e.Object, e.Err = o.name, o.err
			}
			return e
		}
		r.cfg.KillPoint("restore/" + step.name + "/after")
	}
	return nil
}

func (r *rebuild) close() {
	_ = closeObjects(r.objects)
	r.exe.close()
	_ = r.laid.close()
	if r.pidfd >= 0 {
		_ = unix.Close(r.pidfd)
	}
	if r.mem != nil {
		_ = r.mem.Close()
	}
	if r.veilFD != nil {
		_ = r.veilFD.Close()
	}
}

// check finds out what would fail later, and changes nothing.
func (r *rebuild) check() (err error) {
	if r.lastCap, err = lastCapability(); err != nil {
		return err
	}
	if err := checkMappings(r.p); err != nil {
		return err
	}
	if c := &r.p.Creds; (c.CapPrm|c.CapEff|c.CapAmb|c.CapInh)&^r.creds.CapPrm != 0 {
		return fmt.Errorf("%w: it has capabilities %#x, which we have not to give", ErrUnsupported, (c.CapPrm|c.CapEff|c.CapAmb|c.CapInh)&^r.creds.CapPrm)
	}
	if err := r.checkFiles(); err != nil {
		return err
	}
	own := make([]byte, 16<<10)
	var n int
	r.tr.Do(func() { n, err = sys.PtraceGetXState(r.seed.pid, own) })
	if err != nil {
		return fmt.Errorf("extended state: %w", err)
	}
	theirs, ours := r.p.Threads[0].XState, own[:n]
	if len(theirs) != len(ours) || sys.XStateFeatures(theirs) != sys.XStateFeatures(ours) {
		return fmt.Errorf("%w: extended processor state of %d bytes with features %#x, this host has %d bytes with %#x", ErrUnsupported,
			len(theirs), sys.XStateFeatures(theirs), len(ours), sys.XStateFeatures(ours))
	}
	return nil
}

// threads makes the process, unless Prepare could, and all its threads. Where a
// number is taken it begins again in a pid namespace, if it may.
func (r *rebuild) threads() error {
	now := clocks{r.img.Monotonic, r.img.Boottime}
	want := birth{pid: r.p.PID, pgid: r.p.PGID, sid: r.p.SID}
	switch {
	case !r.fits(r.p, now):
		r.unborn()
		if err := r.beborn(want, now); err != nil {
			return err
		}
	case r.born.sid != want.sid || r.born.pgid != want.pgid:
		want.newNS = r.born.newNS
		if err := r.join(want); err != nil {
			return err
		}
		r.born = want
	}
	for {
		var err error
		if err = r.relocate(layoutOf(r.p)); err != nil {
			return err
		}
		sig, waiting := batchSignal(r.p)
		r.target.t.UseSignal(sig)
		r.target.t.KeepBlocked(waiting)
		err = r.makeThreads(r.p)
		if err == nil {
			break
		}
		if !errors.Is(err, ErrPIDBusy) || r.born.newNS || r.cfg.PIDNamespace != NamespaceAuto {
			return err
		}
		r.unborn()
		b := r.born
		b.newNS = true
		if err := r.bear(b, now); err != nil {
			return err
		}
	}
	if err := r.emancipate(); err != nil {
		return err
	}
	var err error
	if r.pidfd, err = unix.PidfdOpen(r.target.pid, 0); err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	if r.mem, err = os.OpenFile(fmt.Sprintf("/proc/%d/mem", r.target.pid), os.O_RDWR, 0); err != nil {
		return err
	}
	return nil
}

// batchSignal is the signal that ends batches: one that nobody has pending, for
// that would end them too. waiting are those that somebody has, as bits: among
// them may be the one of a fault, of a thread that was stopped before its handler
// ran.
func batchSignal(p *image.Process) (sig unix.Signal, waiting uint64) {
	note := func(list [][]byte) {
		for _, si := range list {
			var info sys.Siginfo
			copy(info[:], si)
			if n := info.Signo(); n >= 1 && n <= 64 {
				waiting |= sys.SigBit(n)
			}
		}
	}
	note(p.Pending)
	for i := range p.Threads {
		note(p.Threads[i].Pending)
	}
	candidates := []unix.Signal{unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD, unix.SIGIO, unix.SIGPWR}
	for n := unix.Signal(34); n <= 64; n++ {
		candidates = append(candidates, n)
	}
	for _, c := range candidates {
		if waiting&sys.SigBit(int(c)) == 0 {
			return c, waiting
		}
	}
	return unix.SIGURG, waiting
}
