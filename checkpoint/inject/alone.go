package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
)

// Where the code of the gate lies in the first page of the stub area, and the gate
// in its arena, behind the record for mapping more.
const (
	gateAt     = 0x100
	gateOffset = 96
	gateSize   = 16
)

// RunAlone is Run such that none of the threads in others, which are stopped and
// are all that the process has beside tid, executes anything of the program before
// all calls of the batch have been made: whatever becomes of the tracer. With Run
// they go on when the tracer dies, and the batch beside them.
//
// Each of them is put before a gate, that only the end of the batch opens. In this
// order every moment between two requests is safe:
//
//  1. tid stands at the end of an empty batch, behind which it opens the gate
//  2. the others are sent to the gate, which is open
//  3. the gate is shut
//  4. tid gets the batch
//
// certain, if not nil, is called then: from there on all calls will be made, whatever
// becomes of the tracer. Where it fails none is.
//
// When it returns the others are as they were.
func (b *Batch) RunAlone(tid int, others []int, certain func() error) (err error) {
	t := b.t
	b.certain = certain
	t.tr.Do(func() { err = t.runAlone(Job{tid, b}, others) })
	b.finish()
	return err
}

func (t *Target) runAlone(j Job, others []int) error {
	if t.idle != 0 && j.Batch.certain != nil {
		if err := j.Batch.certain(); err != nil {
			return err
		}
	}
	if t.idle != 0 || len(others) == 0 && j.Batch.certain == nil {
		return runAll([]Job{j})
	}
	if err := t.load([]Job{j}); err != nil {
		return err
	}
	th := t.threads[j.TID]
	gate := t.growRec + gateOffset
	if err := t.setGate(gate, 0, th.block); err != nil {
		return err
	}
	r := th.how.Ready
	r.Rip, r.R12, r.R13 = uint64(t.code.Start), j.Batch.recs, 0
	r.Rbx, r.Rbp, r.R15 = uint64(t.code.Start)+gateAt+gateOpen, uint64(t.sig), gate
	if err := t.prepare(th, &r); err != nil {
		return err
	}
	err := t.park(others, gate)
	if err == nil {
		err = t.setGate(gate, 1, th.block)
	}
	if err == nil {
		Point("gate-shut")
		r.R13 = uint64(len(j.Batch.table) / recSize)
		if err = sys.PtraceSetRegs(th.tid, &r); err != nil {
			err = t.gone(fmt.Errorf("set the registers of thread %d: %w", th.tid, err))
		}
	}
	var refused error
	if err == nil && j.Batch.certain != nil {
		if refused = j.Batch.certain(); refused != nil {
			r.R13 = 0
			if err = sys.PtraceSetRegs(th.tid, &r); err != nil {
				err = t.gone(fmt.Errorf("set the registers of thread %d: %w", th.tid, err))
			}
		}
	}
	if err == nil {
		Point("gate-batch")
		began := time.Now()
		if err = sys.PtraceCont(th.tid, 0); err != nil {
			err = t.gone(fmt.Errorf("start a batch on thread %d: %w", th.tid, err))
		} else {
			Point("gate-running")
			j.Batch.clones, err = t.wait(th, uint64(t.code.Start)+stubEnd)
			Point("gate-ran")
			j.Batch.took = time.Since(began)
		}
	}
	err = errors.Join(err, t.setGate(gate, 0, th.block))
	for _, tid := range others {
		if o := t.threads[tid]; o != nil {
			err = errors.Join(err, t.releaseThread(o))
		}
	}
	if err = errors.Join(err, refused); err != nil {
		return err
	}
	if err := t.fetch([]Job{j}); err != nil {
		return err
	}
	return j.Batch.results(j.TID)
}

// park sends threads to the gate, which is open.
func (t *Target) park(tids []int, gate uint64) error {
	threads, err := t.beginAt(tids)
	if err != nil {
		return err
	}
	if err := t.writeBlocks(threads); err != nil {
		return err
	}
	for _, th := range threads {
		r := th.how.Ready
		r.Rip, r.Rbx, r.R15 = uint64(t.code.Start)+gateAt, th.block, gate
		r.Orig_rax = ^uint64(0)
		r.Eflags &^= 0x500
		// Its mask comes back last, whatever happens from here on.
		th.entered = true
		if err := sys.PtraceSetRegs(th.tid, &r); err != nil {
			return t.gone(fmt.Errorf("set the registers of thread %d: %w", th.tid, err))
		}
		// The code of the gate raises no fault, so those signals wait as well: a
		// handler would be the program's code.
		if err := sys.PtraceSetSigmask(th.tid, ^uint64(0)); err != nil {
			return t.gone(fmt.Errorf("block the signals of thread %d: %w", th.tid, err))
		}
		Point("gate-parked")
	}
	return nil
}

// beginAt is begin for threads that go to the gate. There may be hundreds, and nearly
// always they execute nothing of ours.
func (t *Target) beginAt(tids []int) ([]*thread, error) {
	regs := make([]sys.Regs, len(tids))
	threads := make([]*thread, len(tids))
	var v vectors
	at := make([]byte, 8*len(tids))
	for i, tid := range tids {
		r := &regs[i]
		if err := sys.PtraceGetRegs(tid, r); err != nil {
			return nil, t.gone(fmt.Errorf("read the registers of thread %d: %w", tid, err))
		}
		if r.Cs != userCS {
			return nil, fmt.Errorf("pid %d thread %d: %w", t.pid, tid, ErrMode)
		}
		mask, err := sys.PtraceGetSigmask(tid)
		if err != nil {
			return nil, t.gone(fmt.Errorf("read the signal mask of thread %d: %w", tid, err))
		}
		threads[i] = &thread{tid: tid, mask: mask}
		area, err := t.rseqArea(tid, r.Fs_base)
		if err != nil {
			return nil, err
		}
		if area != 0 {
			v.add(area+sys.RseqCSOffset, at[8*i:][:8])
		}
	}
	if err := v.read(t.pid); err != nil {
		// One area is not where it was: each is asked for.
		t.rseq = nil
		for i := range at {
			at[i] = 1
		}
	}
	for i, th := range threads {
		if binary.LittleEndian.Uint64(at[8*i:]) != 0 {
			if err := t.abortSequence(th.tid, &regs[i]); err != nil {
				return nil, err
			}
		}
		th.how = interpretAgain(regs[i])
		t.threads[th.tid] = th
	}
	return threads, nil
}

// rseqArea is where a thread has its struct rseq, 0 if it has none. It lies in the memory
// that the thread's FS register leads to, so it is asked for once for each of those.
func (t *Target) rseqArea(tid int, fs uint64) (uint64, error) {
	if a, ok := t.rseq[tid]; ok && a.fs == fs {
		return a.at, nil
	}
	c, err := sys.PtraceGetRseq(tid)
	if err != nil && !errors.Is(err, sys.ErrNotSupported) {
		return 0, t.gone(err)
	}
	if t.rseq == nil {
		t.rseq = map[int]rseqArea{}
	}
	t.rseq[tid] = rseqArea{fs, c.Pointer}
	return c.Pointer, nil
}

type rseqArea struct{ fs, at uint64 }

func (t *Target) setGate(at uint64, shut uint32, resume uint64) error {
	b := make([]byte, gateSize)
	binary.LittleEndian.PutUint32(b, shut)
	binary.LittleEndian.PutUint64(b[8:], resume)
	var v vectors
	v.add(at, b)
	if err := v.write(t.pid); err != nil {
		return t.gone(fmt.Errorf("write to the stub area of pid %d: %w", t.pid, err))
	}
	return nil
}
