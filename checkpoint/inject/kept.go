package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Room is how large the stub area of a target is that is kept while the process
// runs. Such an area should never have to grow: what was added is not known to
// whoever finds it when this program has died.
type Room struct {
	Threads int    // that can be at work at once
	Arena   uint64 // bytes for batches
	Note    uint64 // bytes of the note, see Target.WriteNote
	// Maps are the mappings of the process as they were a moment ago; nil: they are
	// read. Only the vdso and what is mapped from files is looked at.
	Maps []proc.Mapping
}

// A kept area says at headerAt of its first page what it is:
//
//	magic[8] areaBytes[8] noteAddr[8] noteBytes[8]
const (
	headerAt   = 0x200
	headerSize = 32
	keptMagic  = "pgferry\x02"
)

// BootstrapKept is Bootstrap for a target that is kept over several stops: each
// ends with Rest, and the next begins with Again. A child of the process does not
// inherit the area. Threads between two stops must not be touched.
func BootstrapKept(tr *proc.Tracer, pid, tid int, room Room) (t *Target, err error) {
	tr.Do(func() { t, err = bootstrapKept(tr, pid, tid, room) })
	if err != nil {
		return nil, fmt.Errorf("prepare pid %d for injected calls: %w", pid, err)
	}
	return t, nil
}

func bootstrapKept(tr *proc.Tracer, pid, tid int, room Room) (*Target, error) {
	room.Note = uint64(page.Addr(max(room.Note, 1)).Ceil())
	room.Arena = uint64(page.Addr(room.Arena).Ceil())
	t, err := bootstrap(tr, pid, tid, room)
	if err != nil {
		return nil, err
	}
	b := t.Batch()
	b.Call(unix.SYS_MADVISE, uint64(t.area.Start), t.area.Bytes(), unix.MADV_DONTFORK)
	if err := b.Run(tid); err != nil {
		return nil, errors.Join(err, t.close(tid))
	}
	return t, nil
}

// setNote makes the end of the area a note.
func (t *Target) setNote(bytes uint64) {
	a := t.space.arenas[0]
	a.End -= page.Addr(bytes)
	t.note = page.Range{Start: a.End, End: t.area.End}
}

// firstPage is the code that all threads share, and of a kept area what it is.
func (t *Target) firstPage() []byte {
	b := make([]byte, 0, headerAt+headerSize)
	b = append(b, stubCode...)
	b = append(b[:gateAt], gateCode...)
	if t.note.Empty() {
		return b
	}
	b = append(b[:headerAt], keptMagic...)
	for _, v := range []uint64{t.area.Bytes(), uint64(t.note.Start), t.note.Bytes()} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// Rest ends a stop: every thread gets its registers and mask back, and nothing of
// ours is executed until Again. deliver is with which signals threads must leave
// their stop, stop the stop signal that was held back: see Deliver and Stopped.
func (t *Target) Rest() (deliver map[int]unix.Signal, stop unix.Signal, err error) {
	err = t.ReleaseAll()
	if err == nil && t.slack != 0 {
		err = t.wipeSlack()
	}
	deliver, stop = t.deliver, t.stopSig
	t.deliver, t.stopSig, t.blocks = nil, 0, 0
	return deliver, stop, err
}

// Again begins another stop of the process, in which batches run on thread tid.
// ErrLost: the stub area is not there any more, or too small for as many threads
// as the process has by now.
func (t *Target) Again(tid int) (err error) {
	t.tr.Do(func() { err = t.again(tid) })
	return err
}

func (t *Target) again(tid int) error {
	t.home = tid
	n, err := t.inspect(tid)
	if err != nil {
		return err
	}
	if int(t.code.Bytes()-page.Size)/blockSize < n {
		return fmt.Errorf("pid %d has %d threads: %w", t.pid, n, ErrLost)
	}
	if !t.Intact() {
		return fmt.Errorf("pid %d: %w", t.pid, ErrLost)
	}
	return nil
}

// Intact reports whether the area of a kept target is still there.
func (t *Target) Intact() bool {
	var code [headerAt + headerSize]byte
	_, err := t.mem.ReadAt(code[:], int64(t.code.Start))
	return err == nil && isKept(code[:])
}

// ErrLost says that the stub area of a kept target cannot be used any more.
var ErrLost = errors.New("the area for injected calls is gone or too small")

func isKept(code []byte) bool {
	return len(code) >= headerAt+headerSize && bytes.HasPrefix(code, stubCode) && string(code[headerAt:][:len(keptMagic)]) == keptMagic
}

// WriteNote puts b at the beginning of the note, where Left finds it should this
// program die. Only after BootstrapKept.
func (t *Target) WriteNote(b []byte) error {
	if uint64(len(b)) > t.note.Bytes() {
		return fmt.Errorf("a note of %d bytes for %d", len(b), t.note.Bytes())
	}
	var v vectors
	v.add(uint64(t.note.Start), b)
	return t.gone(v.write(t.pid))
}

// Kept is a stub area in a process.
type Kept struct {
	page.Range
	Note []byte
}

// Left finds kept stub areas in a process, those of targets included that are at
// work. maps are its mappings, mem its memory.
func Left(maps []proc.Mapping, mem *proc.Memory) []Kept {
	var out []Kept
	for i := range maps {
		m := &maps[i]
		if m.Prot != unix.PROT_READ|unix.PROT_EXEC || m.Shared || m.Ino != 0 || m.Name != "" {
			continue
		}
		var code [headerAt + headerSize]byte
		if mem.ReadAt(code[:], m.Start) != nil || !isKept(code[:]) {
			continue
		}
		h := code[headerAt+len(keptMagic):]
		size, at, n := binary.LittleEndian.Uint64(h), binary.LittleEndian.Uint64(h[8:]), binary.LittleEndian.Uint64(h[16:])
		k := Kept{Range: page.Range{Start: m.Start, End: m.Start + page.Addr(size)}}
		const most = 1 << 20
		note := page.Range{Start: page.Addr(at), End: page.Addr(at + n)}
		if size > 1<<30 || n > most || !k.Covers(note) || !k.Aligned() {
			continue // the program's own, by an odd chance
		}
		k.Note = make([]byte, n)
		if mem.ReadAt(k.Note, note.Start) == nil {
			out = append(out, k)
		}
	}
	return out
}

// Inside reports whether thread tid, which is stopped, executes something in r when it
// goes on: one that a batch of this stop has run on stands in the area of the target until
// Rest.
func (t *Target) Inside(tid int, r page.Range) (in bool, err error) {
	t.tr.Do(func() {
		var regs sys.Regs
		if th := t.threads[tid]; th != nil && th.entered {
			regs = th.how.Ready
		} else {
			err = sys.PtraceGetRegs(tid, &regs)
		}
		in = r.Contains(page.Addr(regs.Rip))
	})
	return in, err
}
