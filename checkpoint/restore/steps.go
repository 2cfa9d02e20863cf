package restore

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// layout clears the address space but for the stub area and puts the vdso and
// the shared memory objects into it.
func (r *rebuild) layout() error {
	if err := r.landing.end(); err != nil {
		return err
	}
	v, err := r.vdso()
	if err != nil {
		return err
	}
	taken := append(layoutOf(r.p), r.area)
	if len(v.parts) > 0 {
		taken = append(taken, v.span())
	}
	if r.objects, err = sharedObjects(r.img, r.p, r.m); err != nil {
		return err
	}
	next := helperFDs
	if n := len(r.p.FDs); n > 0 {
		next = max(next, r.p.FDs[n-1].Num+1)
	}
	for _, o := range r.laid.objects {
		next = max(next, o.fd+1)
	}
	s := newScript(r.target.t)
	if err := errors.Join(r.evade(s, taken, nil), r.adoptObjects(s, r.objects)); err != nil {
		s.Discard()
		return err
	}
	keep := append(r.keepable(r.p), r.area)
	if len(v.parts) > 0 {
		keep = append(keep, v.span())
	}
	for _, o := range r.laid.objects {
		keep, taken = append(keep, o.temp), append(taken, o.temp)
	}
	s.clear(r.target.pid, keep...)
	if err := placeObjects(r.objects, next, &taken); err != nil {
		s.Discard()
		return err
	}
	patch, err := placeVDSO(s, v, r.p, taken, r.cfg.ForceVDSOBridge)
	if err != nil {
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
	if err := r.settleObjects(); err != nil {
		return err
	}
	for _, o := range r.objects {
		if err := o.fill(r.pidfd, r.mem); err != nil {
			return err
		}
	}
	return nil
}

// mappings makes all of them, and the userfaultfd: in one batch, unless they are
// very many.
func (r *rebuild) mappings() error {
	s, tid := newScript(r.target.t), r.target.pid
	mapAll(s, tid, r.p, &r.laid, r.from)
	for _, o := range r.objects {
		o.mapInto(s, tid)
	}
	if r.laid.maps != nil {
		if err := s.run(r.target.pid); err != nil {
			return err
		}
		if err := r.mend(r.p); err != nil {
			return err
		}
		s = newScript(r.target.t)
	}
	dressAll(s, tid, r.p)
	trapped := r.rest != nil || !r.m.Lazy.Empty()
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

// content takes mem for the map of the one address space there is.
func (r *rebuild) content(mem []image.Memory) (err error) {
	r.m = &image.Memory{}
	if len(mem) == 1 && mem[0].Space == 0 {
		r.m = &mem[0]
	} else if len(mem) > 0 {
		return fmt.Errorf("%w: memory of %d spaces for one process", image.ErrFormat, len(mem))
	}
	r.m = droppable(r.p, r.m)
	r.regions, err = planRegions(r.p, r.m, r.from)
	return err
}

// theRest waits for the map of anonymous memory, gives up what is stale of it, and
// makes the guards in it before anything traps it.
func (r *rebuild) theRest() error {
	if r.rest != nil {
		more, err := r.rest(r.ctx)
		if err != nil {
			return err
		}
		if err := r.content(image.Join([]image.Memory{*r.m}, more)); err != nil {
			return err
		}
	}
	if err := r.keep(); err != nil {
		return err
	}
	s := newScript(r.target.t)
	guardAll(s, r.target.pid, r.p, r.m)
	lockAll(s, r.target.pid, r.p)
	return s.run(r.target.pid)
}

// keep takes what was landed and has not changed out of what is to come, and
// gives up the rest of it: nothing would trap an access to a stale page.
func (r *rebuild) keep() (err error) {
	if r.laid.pages.Empty() {
		return nil
	}
	content := page.Union(&r.m.Lazy, &r.m.Eager)
	clean := page.Difference(&content, &r.m.Dirty)
	here := page.Intersection(&r.laid.pages, &clean)
	stale := page.Difference(&r.laid.pages, &here)
	if err := r.drop(&stale); err != nil {
		return err
	}
	for _, s := range []*page.Set{&r.m.Lazy, &r.m.Eager, &r.m.Hot} {
		*s = page.Difference(s, &here)
	}
	r.kept = here
	r.cfg.Log.Debug("landed before the freeze", "pid", r.p.PID, "kept_pages", here.Pages(), "stale_pages", stale.Pages())
	r.regions, err = planRegions(r.p, r.m, r.from)
	return err
}

// adopt hands the memory over. The process's own copy of the userfaultfd is
// closed with the other descriptors of the seed, by the next step.
func (r *rebuild) adopt() error {
	if err := r.veil(); err != nil {
		return err
	}
	return r.handOver()
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
	exe, err := r.passExe()
	if err != nil {
		return err
	}
	s := newScript(r.target.t)
	memoryMap(s, r.p, r.exePath(), exe)
	processState(s, r.p)
	ask := s.call(unix.SYS_PRCTL, sys.PrTimerCreateRestoreIDs, prTimerCreateRestoreIDsGet, 0, 0, 0).Optional()
	pendingShared(s, r.p)
	if err := s.run(tid); err != nil {
		return err
	}
	_, err = ask.Ret()
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
	sealAll(s, r.target.pid, r.p)
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
