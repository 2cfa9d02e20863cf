package inject

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Job is a batch and the thread to run it on.
type Job struct {
	TID   int
	Batch *Batch
}

// Run makes the calls of the batch on the stopped thread tid and returns when
// the thread is stopped again: nil, a *CallError for the first call that failed
// and was not optional (later ones were not made), a *FaultError, or an error
// that is proc.ErrGone. The batch is spent in every case.
func (b *Batch) Run(tid int) error { return RunAll([]Job{{tid, b}}) }

// RunAll runs many batches, each on a thread of its own, at once: all are started
// before any is waited for. All batches must be of targets of one Tracer. Errors
// are joined; every thread is stopped when it returns.
func RunAll(jobs []Job) (err error) {
	if len(jobs) == 0 {
		return nil
	}
	jobs[0].Batch.t.tr.Do(func() { err = runAll(jobs) })
	for _, j := range jobs {
		j.Batch.finish()
	}
	return err
}

func runAll(jobs []Job) error {
	targets := byTarget(jobs)
	for t, js := range targets {
		if err := t.load(js); err != nil {
			return err
		}
	}
	var errs []error
	started := make([]bool, len(jobs))
	for i, j := range jobs {
		if err := j.Batch.t.enter(j); err != nil {
			errs = append(errs, err)
			continue
		}
		started[i] = true
	}
	Point("running")
	failed := make([]bool, len(jobs))
	for i, j := range jobs {
		if !started[i] {
			continue
		}
		t := j.Batch.t
		clones, err := t.wait(t.threads[j.TID], uint64(t.code.Start)+stubEnd)
		j.Batch.clones = clones
		if err != nil {
			errs, failed[i] = append(errs, err), true
		}
	}
	Point("ran")
	for t, js := range targets {
		if err := t.fetch(js); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	for i, j := range jobs {
		if !started[i] {
			continue
		}
		if err := j.Batch.results(j.TID); err != nil && !failed[i] {
			errs = append(errs, err)
		}
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

func byTarget(jobs []Job) map[*Target][]Job {
	m := make(map[*Target][]Job, 1)
	for _, j := range jobs {
		m[j.Batch.t] = append(m[j.Batch.t], j)
	}
	return m
}

// load writes trampolines, records and data of the jobs into the process.
func (t *Target) load(jobs []Job) error {
	var fresh []int
	for _, j := range jobs {
		if t.threads[j.TID] == nil {
			fresh = append(fresh, j.TID)
		}
		if err := j.Batch.layout(); err != nil {
			return err
		}
	}
	if err := t.begin(fresh); err != nil {
		return err
	}
	threads := make([]*thread, 0, len(fresh))
	for _, j := range jobs {
		if th := t.threads[j.TID]; th.block == 0 {
			threads = append(threads, th)
		}
	}
	if err := t.writeBlocks(threads); err != nil {
		return err
	}
	var v vectors
	for _, j := range jobs {
		b := j.Batch
		v.add(b.recs, b.table)
		for _, c := range b.in.list {
			v.add(c.addr, c.buf)
		}
		for _, c := range b.out.list {
			v.add(c.addr, c.buf)
		}
	}
	if err := v.write(t.pid); err != nil {
		return t.gone(fmt.Errorf("write a batch of calls into pid %d: %w", t.pid, err))
	}
	return nil
}

// fetch reads results back.
func (t *Target) fetch(jobs []Job) error {
	var v vectors
	for _, j := range jobs {
		v.add(j.Batch.recs, j.Batch.table)
		for _, c := range j.Batch.out.list {
			v.add(c.addr, c.buf)
		}
	}
	if err := v.read(t.pid); err != nil {
		return t.gone(fmt.Errorf("read the results of a batch from pid %d: %w", t.pid, err))
	}
	return nil
}

const userCS = 0x33 // __USER_CS of x86-64

// interpretAgain is Interpret that leaves a mark in its place: a call that is stopped
// again and again would never end without.
func interpretAgain(r sys.Regs) Interrupted {
	in := Interpret(r)
	if in.Code != 0 && in.Mark != 0 {
		in.SetMark(in.Mark)
	}
	return in
}

// begin notes what must be put back of threads that run nothing of ours yet.
func (t *Target) begin(tids []int) error {
	for _, tid := range tids {
		var r sys.Regs
		if err := sys.PtraceGetRegs(tid, &r); err != nil {
			return t.gone(fmt.Errorf("read the registers of thread %d: %w", tid, err))
		}
		if r.Cs != userCS {
			return fmt.Errorf("pid %d thread %d: %w", t.pid, tid, ErrMode)
		}
		mask, err := sys.PtraceGetSigmask(tid)
		if err != nil {
			return t.gone(fmt.Errorf("read the signal mask of thread %d: %w", tid, err))
		}
		if t.idle == 0 {
			if err := t.abortSequence(tid, &r); err != nil {
				return err
			}
		}
		th := &thread{tid: tid, how: interpretAgain(r), mask: mask, open: faults &^ mask &^ t.keep}
		if err := t.keepFaults(th); err != nil {
			return err
		}
		t.threads[tid] = th
	}
	return nil
}

// keepFaults blocks those of the fault signals that wait to be delivered: the
// thread stopped between a fault and its handler, and must find it there.
func (t *Target) keepFaults(th *thread) error {
	for _, shared := range []bool{false, true} {
		pending, err := sys.PtracePeekSiginfo(th.tid, shared)
		if err != nil {
			return t.gone(fmt.Errorf("read the pending signals of thread %d: %w", th.tid, err))
		}
		for i := range pending {
			th.open &^= sys.SigBit(pending[i].Signo())
		}
	}
	return nil
}

// abortSequence sends a thread that stopped inside a restartable sequence to its
// abort handler, as the kernel does after every preemption. The first injected
// call would make the kernel forget that it was in one.
func (t *Target) abortSequence(tid int, r *sys.Regs) error {
	c, err := sys.PtraceGetRseq(tid)
	if errors.Is(err, sys.ErrNotSupported) || err == nil && c.Pointer == 0 {
		return nil
	}
	if err != nil {
		return t.gone(err)
	}
	var p [8]byte
	if _, err := t.mem.ReadAt(p[:], int64(c.Pointer+sys.RseqCSOffset)); err != nil {
		return t.gone(fmt.Errorf("read the rseq area of thread %d: %w", tid, err))
	}
	at := binary.LittleEndian.Uint64(p[:])
	if at == 0 {
		return nil
	}
	raw := make([]byte, sys.SizeOf[sys.RseqCS]())
	if _, err := t.mem.ReadAt(raw, int64(at)); err != nil {
		return nil // not a critical section: the kernel would kill the thread for it, we need not
	}
	cs, _ := sys.FromBytes[sys.RseqCS](raw)
	if r.Rip-cs.StartIP < cs.PostCommitOffset {
		r.Rip = cs.AbortIP
	}
	return nil
}

// writeBlocks gives threads their resume trampolines.
func (t *Target) writeBlocks(threads []*thread) error {
	if t.idle != 0 {
		for _, th := range threads {
			th.block = t.idle
		}
		return nil
	}
	if len(threads) == 0 {
		return nil
	}
	buf := make([]byte, 0, len(threads)*blockSize)
	first := t.code.Start + page.Size + page.Addr(t.blocks*blockSize)
	if first+page.Addr(cap(buf)) > t.code.End {
		return t.moreBlocks(threads)
	}
	for i, th := range threads {
		th.block = uint64(first) + uint64(i*blockSize)
		buf = append(buf, resumeBlock(&th.how.Ready, th.mask)...)
		buf = buf[:(i+1)*blockSize]
	}
	t.blocks += len(threads)
	return t.writeCode(first, buf)
}

// enter starts a batch. Registers first: a thread that runs the stub under the
// program's own mask is harmless, one that runs the program under ours is not.
func (t *Target) enter(j Job) error {
	th := t.threads[j.TID]
	r := th.how.Ready
	r.Rip = uint64(t.code.Start)
	r.R12, r.R13 = j.Batch.recs, uint64(len(j.Batch.table)/recSize)
	r.Rbx, r.Rbp = th.block, uint64(t.sig)
	return t.start(th, &r)
}

func (t *Target) start(th *thread, r *sys.Regs) error {
	if err := t.prepare(th, r); err != nil {
		return err
	}
	if err := sys.PtraceCont(th.tid, 0); err != nil {
		return t.gone(fmt.Errorf("start a batch on thread %d: %w", th.tid, err))
	}
	return nil
}

// prepare gives a thread the registers and the mask with which it runs code of ours.
func (t *Target) prepare(th *thread, r *sys.Regs) error {
	r.Orig_rax = ^uint64(0)
	r.Eflags &^= 0x500 // no single-stepping, direction up
	Point("enter")
	if err := sys.PtraceSetRegs(th.tid, r); err != nil {
		return t.gone(fmt.Errorf("set the registers of thread %d: %w", th.tid, err))
	}
	Point("enter-regs")
	if !th.entered || th.waited != t.sig { // UseSignal may have chosen another since
		th.entered, th.waited = true, t.sig
		if err := sys.PtraceSetSigmask(th.tid, ^(sys.SigBit(int(t.sig)) | th.open)); err != nil {
			return t.gone(fmt.Errorf("block the signals of thread %d: %w", th.tid, err))
		}
	}
	Point("enter-mask")
	return nil
}

// wait waits until the thread has stopped for the signal at address end, passing
// over other stops, and returns the children it made meanwhile.
func (t *Target) wait(th *thread, end uint64) (clones []int, err error) {
	for {
		ws, err := waitStop(th.tid)
		if err != nil {
			return clones, t.gone(fmt.Errorf("wait for thread %d: %w", th.tid, err))
		}
		switch event := sys.Event(ws); event {
		case 0:
			done, err := t.signalStop(th, ws.StopSignal(), end)
			if err != nil || done {
				return clones, errors.Join(err, adopt(clones))
			}
		case unix.PTRACE_EVENT_FORK, unix.PTRACE_EVENT_VFORK, unix.PTRACE_EVENT_CLONE:
			msg, err := sys.PtraceGetEventMsg(th.tid)
			if err != nil {
				return clones, t.gone(err)
			}
			clones = append(clones, int(msg))
		}
		if err := sys.PtraceCont(th.tid, 0); err != nil {
			return clones, t.gone(fmt.Errorf("go on with a batch on thread %d: %w", th.tid, err))
		}
	}
}

// adopt consumes the first stop of new children.
func adopt(tids []int) error {
	for _, tid := range tids {
		if _, err := sys.WaitStop(tid); err != nil {
			return fmt.Errorf("wait for new thread %d: %w: %w", tid, proc.ErrGone, err)
		}
	}
	return nil
}

// signalStop judges a signal-delivery-stop during a batch. What it does not name
// an error is suppressed by the continuation.
func (t *Target) signalStop(th *thread, sig unix.Signal, end uint64) (done bool, err error) {
	info, err := sys.PtraceGetSiginfo(th.tid)
	if err != nil {
		return false, t.gone(err)
	}
	if sig == t.sig && info.Code() == sys.SITkill {
		var r sys.Regs
		if err := sys.PtraceGetRegs(th.tid, &r); err != nil {
			return false, t.gone(err)
		}
		if r.Rip == end {
			return true, nil
		}
	}
	switch {
	case sig == unix.SIGSTOP:
		t.stopSig = sig
	case faults&sys.SigBit(int(sig)) != 0 && info.Code() > 0:
		var r sys.Regs
		if err := sys.PtraceGetRegs(th.tid, &r); err != nil {
			return false, t.gone(err)
		}
		return false, &FaultError{PID: t.pid, TID: th.tid, Signal: sig, Addr: info.Addr(), IP: r.Rip}
	default:
		th.stray = append(th.stray, info)
	}
	return false, nil
}
