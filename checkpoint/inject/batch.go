package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

var errNotRun = errors.New("the call was not made")

// Batch is a list of calls to be made in one round trip, in order. It is used
// once. An error while it was built (no memory in the process) comes back from
// Run.
type Batch struct {
	t      *Target
	calls  []*Call
	outs   []*Out
	in     chunks // written before the run
	out    chunks // written before and read after it
	recs   uint64 // where the records are, once known
	table  []byte // the records as written, then as read back
	clones []int
	err    error
	done   bool
	took   time.Duration
	// certain: see RunAlone.
	certain func() error
}

// Batch begins an empty batch. Discard it if it will not be run.
func (t *Target) Batch() *Batch {
	t.retain()
	return &Batch{t: t}
}

// Discard gives up a batch that was not run.
func (b *Batch) Discard() { b.finish() }

func (b *Batch) finish() {
	if !b.done {
		b.done = true
		if b.recs != b.t.growRec {
			b.t.release()
		}
	}
}

// Call is one system call of a batch.
type Call struct {
	nr       uint64
	args     [6]uint64
	from     [6]source
	stores   []store
	optional bool
	index    int
	rec      int // index of its record
	ret      uint64
	err      error
}

// source says where an argument comes from when the call is made.
type source struct {
	call *Call  // the result of an earlier call, or
	addr uint64 // what stands there
	wide bool
}

type store struct {
	addr   uint64
	narrow bool
}

// Call appends a system call; missing arguments are 0.
func (b *Batch) Call(nr uintptr, args ...uint64) *Call {
	c := &Call{nr: uint64(nr), index: len(b.calls), err: errNotRun}
	copy(c.args[:], args)
	b.calls = append(b.calls, c)
	return c
}

// Took is how long the calls took after RunAlone, without what it costs to hold the
// other threads.
func (b *Batch) Took() time.Duration { return b.took }

// Len is how many calls the batch has.
func (b *Batch) Len() int { return len(b.calls) }

// Size is how much memory of the process the batch takes, in bytes: about that of
// its calls, and exactly that of what was put there for them.
func (b *Batch) Size() (n int) {
	n = 2 * recSize * len(b.calls) // few have more than one argument that is copied
	for _, list := range [][]chunk{b.in.list, b.out.list} {
		for _, c := range list {
			n += cap(c.buf)
		}
	}
	return n
}

// Arg makes argument i, from 0, the result of an earlier call of the batch. Of
// an optional call that failed, that is the negative errno.
func (c *Call) Arg(i int, from *Call) *Call {
	c.from[i] = source{call: from}
	return c
}

// ArgAt32 makes argument i the 32-bit value, zero-extended, that stands at addr
// when the call is made: what an earlier pipe2 or socketpair wrote there.
func (c *Call) ArgAt32(i int, addr uint64) *Call {
	c.from[i] = source{addr: addr}
	return c
}

// ArgAt64 is ArgAt32 for 64 bits.
func (c *Call) ArgAt64(i int, addr uint64) *Call {
	c.from[i] = source{addr: addr, wide: true}
	return c
}

// StoreAt also stores the result, 64 bits, at addr when the call succeeds.
func (c *Call) StoreAt(addr uint64) *Call {
	c.stores = append(c.stores, store{addr, false})
	return c
}

// StoreAt32 stores the low 32 bits of the result: a descriptor in an array.
func (c *Call) StoreAt32(addr uint64) *Call {
	c.stores = append(c.stores, store{addr, true})
	return c
}

// Optional lets the batch go on if the call fails.
func (c *Call) Optional() *Call {
	c.optional = true
	return c
}

// Ret returns the call's result after Run, or the errno with which it failed.
func (c *Call) Ret() (uint64, error) { return c.ret, c.err }

// Out is memory that is read back after the batch.
type Out struct {
	addr uint64
	buf  []byte
}

// Addr is its address inside the process.
func (o *Out) Addr() uint64 { return o.addr }

// Bytes is its content after Run; before, what it will hold when the batch
// begins, to be set by the caller.
func (o *Out) Bytes() []byte { return o.buf }

// Bytes puts p into the process and returns its address there.
func (b *Batch) Bytes(p []byte) uint64 {
	addr, buf := b.in.take(b, len(p))
	copy(buf, p)
	return addr
}

// String puts s and a zero byte into the process and returns its address.
func (b *Batch) String(s string) uint64 {
	addr, buf := b.in.take(b, len(s)+1)
	copy(buf, s)
	buf[len(s)] = 0
	return addr
}

// Space sets n zero bytes aside that are read back after the run.
func (b *Batch) Space(n int) *Out {
	addr, buf := b.out.take(b, n)
	o := &Out{addr, buf}
	b.outs = append(b.outs, o)
	return o
}

// Clones returns the tids, as the tracer sees them, of the processes and threads
// that calls of the batch created, in order. They are ptrace-stopped.
func (b *Batch) Clones() []int { return b.clones }

// chunks is memory taken piece by piece from the arena. A chunk never moves, so
// slices of it stay good.
type chunks struct {
	list []chunk
}

type chunk struct {
	addr uint64
	buf  []byte // cap is what was taken from the arena
}

const (
	firstChunk = 256
	largeChunk = 256 << 10
)

func (c *chunks) take(b *Batch, n int) (uint64, []byte) {
	want := n
	n = max(16, (n+15)&^15)
	if len(c.list) == 0 || cap(c.list[len(c.list)-1].buf)-len(c.list[len(c.list)-1].buf) < n {
		size := firstChunk
		if k := len(c.list); k > 0 {
			size = min(2*cap(c.list[k-1].buf), largeChunk)
		}
		size = max(size, n)
		addr := uint64(0)
		if b.err == nil {
			addr, b.err = b.t.alloc(uint64(size))
		}
		c.list = append(c.list, chunk{addr, make([]byte, 0, size)})
	}
	k := &c.list[len(c.list)-1]
	at := len(k.buf)
	k.buf = k.buf[:at+n]
	return k.addr + uint64(at), k.buf[at : at+want : at+want]
}

// layout places the records, results of earlier calls being copied into
// arguments by records of their own.
func (b *Batch) layout() error {
	if b.err != nil {
		return b.err
	}
	n := 0
	for _, c := range b.calls {
		for i := range c.from {
			if from := c.from[i].call; from != nil && from.index >= c.index {
				return fmt.Errorf("inject: call %d takes the result of call %d, which comes after it", c.index, from.index)
			}
			if c.from[i] != (source{}) {
				n++
			}
		}
		c.rec = n
		n++
		n += max(0, len(c.stores)-1)
	}
	if b.recs == 0 {
		var err error
		if b.recs, err = b.t.alloc(uint64(n * recSize)); err != nil {
			return err
		}
	}
	b.table = make([]byte, n*recSize)
	for _, c := range b.calls {
		b.encode(c)
	}
	return nil
}

func (b *Batch) encode(c *Call) {
	le := binary.LittleEndian
	addr := func(rec int) uint64 { return b.recs + uint64(rec*recSize) }
	at := c.rec
	for i := range c.from {
		f := c.from[i]
		if f == (source{}) {
			continue
		}
		at--
		r := b.table[at*recSize:]
		flags := uint64(recCopy)
		switch {
		case f.call != nil:
			le.PutUint64(r[recArgs:], addr(f.call.rec)+recRet)
		case f.wide:
			le.PutUint64(r[recArgs:], f.addr)
		default:
			le.PutUint64(r[recArgs:], f.addr)
			flags |= recCopy32
		}
		le.PutUint64(r[recStore:], addr(c.rec)+recArgs+uint64(i)*8)
		le.PutUint64(r[recFlags:], flags)
	}
	r := b.table[c.rec*recSize:]
	le.PutUint64(r[recNr:], c.nr)
	for i, v := range c.args {
		le.PutUint64(r[recArgs+8*i:], v)
	}
	le.PutUint64(r[recRet:], unset)
	var flags uint64
	if c.optional {
		flags |= recOptional
	}
	for i, s := range c.stores {
		if i > 0 {
			r = b.table[(c.rec+i)*recSize:]
			le.PutUint64(r[recArgs:], addr(c.rec)+recRet)
			flags = recCopy
		}
		if s.narrow {
			flags |= recNarrow
		}
		le.PutUint64(r[recStore:], s.addr)
		le.PutUint64(r[recFlags:], flags)
	}
	if len(c.stores) == 0 {
		le.PutUint64(r[recFlags:], flags)
	}
}

// unset is what a record's result is before the call was made; no call returns
// it, being neither an errno nor an address of user space.
const unset = 0xfeed_face_0000_0001

// results takes the calls' results from the records as read back.
func (b *Batch) results(tid int) error {
	var first error
	for _, c := range b.calls {
		v := binary.LittleEndian.Uint64(b.table[c.rec*recSize+recRet:])
		if v == unset {
			continue
		}
		c.ret, c.err = v, nil
		if e := -int64(v); e > 0 && e < 4096 {
			c.err = unix.Errno(e)
			if !c.optional && first == nil {
				first = &CallError{PID: b.t.pid, TID: tid, Index: c.index, Nr: uintptr(c.nr),
					Name: sys.SyscallName(uintptr(c.nr)), Args: c.args, Errno: unix.Errno(e)}
			}
		}
	}
	return first
}
