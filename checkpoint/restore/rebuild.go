package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// rebuild is the work on one process, from image to registers.
type rebuild struct {
	*Skeleton
	ctx  context.Context
	img  *image.Image
	p    *image.Process
	m    *image.Memory
	trap Trap

	lastCap int
	area    page.Range
	regions []Region
	objects []*sharedObject
	pidfd   int
	mem     *os.File
	uffd    int // number in the process, -1 for none
}

// Rebuild makes the process of img. When it returns, the process is whole and
// stands still in the tracer's hands. mem says what content there is, by space;
// trap brings it. If it fails, nothing is left, as after Abort.
func (s *Skeleton) Rebuild(ctx context.Context, img *image.Image, mem []image.Memory, trap Trap) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded {
		return fmt.Errorf("restore: rebuild of a skeleton that is %v: %w", s.state, ErrState)
	}
	// A call of the process that waits for a page that never comes ends with it.
	stop := context.AfterFunc(ctx, func() { _ = killAll(s.group) })
	defer stop()
	r := &rebuild{Skeleton: s, ctx: ctx, img: img, trap: trap, pidfd: -1, uffd: -1}
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
	r.m = &image.Memory{}
	if len(mem) == 1 && mem[0].Space == 0 {
		r.m = &mem[0]
	} else if len(mem) > 0 {
		return &Error{Step: "check", PID: r.p.PID, Err: fmt.Errorf("%w: memory of %d spaces for one process", image.ErrFormat, len(mem))}
	}
	r.m = droppable(r.p, r.m)
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"check", r.check},
		{"threads", r.threads},
		{"layout", r.layout},
		{"mappings", r.mappings},
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
	if r.pidfd >= 0 {
		_ = unix.Close(r.pidfd)
	}
	if r.mem != nil {
		_ = r.mem.Close()
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
	if r.regions, err = planRegions(r.p, r.m); err != nil {
		return err
	}
	if err := checkFiles(r.p); err != nil {
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
	if !r.fits(r.p, now) {
		r.unborn()
		if err := r.beborn(birth{pid: r.p.PID, pgid: r.p.PGID, sid: r.p.SID}, now); err != nil {
			return err
		}
	}
	for {
		var err error
		if r.area, err = r.relocate(r.p); err != nil {
			return err
		}
		r.target.t.UseSignal(batchSignal(r.p))
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
// that would end them too.
func batchSignal(p *image.Process) unix.Signal {
	taken := map[int]bool{}
	note := func(list [][]byte) {
		for _, si := range list {
			var info sys.Siginfo
			copy(info[:], si)
			taken[info.Signo()] = true
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
		if !taken[int(c)] {
			return c
		}
	}
	return unix.SIGURG
}

// layout clears the address space but for the stub area and puts the vdso and
// the shared memory objects into it.
func (r *rebuild) layout() error {
	v, err := r.vdso()
	if err != nil {
		return err
	}
	taken := append(layoutOf(r.p), r.area)
	if len(v.parts) > 0 {
		taken = append(taken, v.span())
	}
	s := newScript(r.target.t)
	if len(v.parts) > 0 {
		s.clear(r.area, v.span())
	} else {
		s.clear(r.area)
	}
	patch, err := placeVDSO(s, v, r.p, taken, r.cfg.ForceVDSOBridge)
	if err != nil {
		s.Discard()
		return err
	}
	if len(v.parts) > 0 {
		taken = append(taken, v.span())
	}
	if r.objects, err = sharedObjects(r.img, r.p, r.m, &taken); err != nil {
		s.Discard()
		return err
	}
	for _, o := range r.objects {
		o.make(s)
	}
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	if patch != nil {
		r.cfg.Log.Info("vdso of another kernel: bridged", "id", r.cfg.ID, "pid", r.p.PID)
		if _, err := r.mem.WriteAt(patch.bytes, int64(patch.at)); err != nil {
			return fmt.Errorf("write the vdso: %w", err)
		}
	}
	for _, o := range r.objects {
		if err := o.fill(r.pidfd, r.mem); err != nil {
			return err
		}
	}
	return nil
}

// mappings makes all of them, and the userfaultfd: in one batch.
func (r *rebuild) mappings() error {
	s := newScript(r.target.t)
	mapAll(s, r.p)
	for _, o := range r.objects {
		o.mapInto(s)
	}
	dressAll(s, r.p)
	trapped := false
	for _, g := range r.regions {
		trapped = trapped || g.Kind == RegionUFFD
	}
	s.onf("userfaultfd")
	get := func() (uint64, error) { return 0, nil }
	if trapped {
		get = s.call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK).Ret
	}
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	if !trapped {
		return nil
	}
	fd, err := get()
	r.uffd = int(fd)
	return err
}

// adopt hands the memory over. The process's own copy of the userfaultfd is
// closed with the other descriptors of the seed, by the next step.
func (r *rebuild) adopt() error {
	return adopt(r.ctx, r.trap, 0, r.target.pid, r.pidfd, r.uffd, r.regions, r.m)
}

func (r *rebuild) descriptors() error {
	c := &fds.RestoreContext{
		Target: r.target.t, TID: r.target.pid, PID: r.target.pid, Image: r.img, Process: r.p,
		MemoryFD: map[int]int{}, Addresses: r.cfg.Addresses, Log: r.cfg.Log,
	}
	for _, o := range r.objects {
		if o.fd != 0 {
			c.MemoryFD[o.index] = o.fd
		}
		if o.keeps() {
			c.Keep = append(c.Keep, o.readOnly)
		}
	}
	return fds.Restore(r.ctx, c)
}

// process sets what all threads share.
func (r *rebuild) process() error {
	tid := r.target.pid
	s := newScript(r.target.t)
	memoryMap(s, r.p)
	processState(s, r.p)
	ask := s.call(unix.SYS_PRCTL, sys.PrTimerCreateRestoreIDs, prTimerCreateRestoreIDsGet, 0, 0, 0).Optional()
	pendingShared(s, r.p)
	if err := s.run(tid); err != nil {
		return err
	}
	_, err := ask.Ret()
	if err := createTimers(r.target.t, tid, r.p.PosixTimers, err == nil && !r.countTimers); err != nil {
		return err
	}
	return r.outside(r.p, r.tids)
}

// prTimerCreateRestoreIDsGet only asks, which tells whether the kernel knows it.
const prTimerCreateRestoreIDsGet = 2

// threadState lets every thread set what is its own, all at once.
func (r *rebuild) threadState() error {
	scripts := make([]*script, len(r.p.Threads))
	for i := range r.p.Threads {
		scripts[i] = newScript(r.target.t)
		threadState(scripts[i], r.p, &r.p.Threads[i], r.lastCap, &r.creds)
	}
	return runAll(r.tids, scripts)
}

// memory waits for the pages that must be there, and closes what depended on it.
func (r *rebuild) memory() error {
	if err := r.trap.WaitEager(r.ctx); err != nil {
		return fmt.Errorf("trap: %w", err)
	}
	s := newScript(r.target.t)
	for _, o := range r.objects {
		o.finish(s)
	}
	sealAll(s, r.p)
	afterCredentials(s, r.p)
	armTimers(s, r.p)
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	for _, o := range r.objects {
		if err := o.seal(); err != nil {
			return err
		}
	}
	return nil
}

// registers takes the stub area away and makes every thread stand where it
// stood. It is the last step: from here on no thread can make a call for us.
func (r *rebuild) registers() (err error) {
	t := r.target.t
	r.target.t = nil
	if err := t.Close(r.target.pid); err != nil {
		return err
	}
	r.tr.Do(func() {
		for i, tid := range r.tids {
			if err = setRegisters(tid, &r.p.Threads[i]); err != nil {
				return
			}
		}
	})
	r.stopped = r.p.Stopped
	return err
}

// vdso is where the kernel put its own in the process.
func (r *rebuild) vdso() (*vdso, error) {
	ms, err := proc.ReadMaps(r.target.pid)
	if err != nil {
		return nil, err
	}
	return vdsoAmong(ms), nil
}
