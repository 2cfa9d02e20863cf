package checkpoint

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// settlePiece is how much is copied from outside at once, in bytes.
const settlePiece = 1 << 20

// pair is pages of a mapping and where they belong in its shadow.
type pair struct{ from, to page.Range }

// copyOwn copies what the program has written over the shadows. The process does it,
// by process_vm_writev(2) to itself: one copy, where from outside it takes two and
// twice the time (0.8 us a page, 1.7 us). That writes nothing but shadows, and it
// cannot read what the program has closed to itself.
func (t *Settler) copyOwn(tid int, list []found) error {
	var inside, outside []pair
	for i := range list {
		f := &list[i]
		pairs := &inside
		if f.of.Prot&unix.PROT_READ == 0 {
			pairs = &outside
		}
		for _, r := range f.own {
			*pairs = append(*pairs, pair{r, from(r, f.shadow+r.Start-f.Start)})
		}
	}
	short, err := t.copyInside(tid, inside)
	if err != nil {
		return err
	}
	return t.copyOutside(append(outside, short...))
}

// copyInside returns those pairs of which not all is known to be copied.
func (t *Settler) copyInside(tid int, all []pair) (short []pair, err error) {
	const most = 1024 // IOV_MAX
	if len(all) == 0 {
		return nil, nil
	}
	// One piece of memory for all vectors: taken piece by piece it would be more.
	vec := make([]byte, 0, 32*len(all))
	add := func(r page.Range) {
		vec = binary.LittleEndian.AppendUint64(vec, uint64(r.Start))
		vec = binary.LittleEndian.AppendUint64(vec, r.Bytes())
	}
	for i := 0; i < len(all); i += most {
		few := all[i:min(i+most, len(all))]
		for _, p := range few {
			add(p.from)
		}
		for _, p := range few {
			add(p.to)
		}
	}
	b := t.target.Batch()
	at := b.Bytes(vec)
	self := b.Call(unix.SYS_GETPID)
	var calls []func() (uint64, error)
	for i := 0; i < len(all); i += most {
		n := uint64(min(most, len(all)-i))
		c := b.Call(unix.SYS_PROCESS_VM_WRITEV, 0, at, n, at+16*n, n, 0).Arg(0, self).Optional()
		calls = append(calls, c.Ret)
		at += 32 * n
	}
	if err := b.Run(tid); err != nil {
		return nil, err
	}
	for i, c := range calls {
		few := all[i*most : min((i+1)*most, len(all))]
		var want uint64
		for _, p := range few {
			want += p.from.Bytes()
		}
		if got, err := c(); err != nil || got != want {
			short = append(short, few...)
			continue
		}
		t.rep.Copied += want
	}
	return short, nil
}

func (t *Settler) copyOutside(all []pair) error {
	var src, dst []page.Range
	var n uint64
	flush := func() error {
		if n == 0 {
			return nil
		}
		buf := t.buffer(n)
		if err := t.mem.ReadPages(src, buf); err != nil {
			return err
		}
		if err := t.writePages(dst, buf); err != nil {
			return err
		}
		t.rep.Copied += n
		src, dst, n = src[:0], dst[:0], 0
		return nil
	}
	for _, p := range all {
		for r := p.from; !r.Empty(); {
			take := r
			take.End = min(r.End, r.Start+page.Addr(settlePiece-n))
			r.Start = take.End
			src, dst = append(src, take), append(dst, from(take, p.to.Start+take.Start-p.from.Start))
			if n += take.Bytes(); n == settlePiece {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// writePages writes buf to rs, one after the other, in a process that is stopped.
func (t *Settler) writePages(rs []page.Range, buf []byte) error {
	const most = 1024 // IOV_MAX
	for len(rs) > 0 {
		few := rs[:min(len(rs), most)]
		rs = rs[len(few):]
		remote := make([]unix.RemoteIovec, len(few))
		n := 0
		for i, r := range few {
			remote[i] = unix.RemoteIovec{Base: uintptr(r.Start), Len: int(r.Bytes())}
			n += int(r.Bytes())
		}
		local := []unix.Iovec{{Base: &buf[0], Len: uint64(n)}}
		got, err := unix.ProcessVMWritev(t.s.pid, local, remote, 0)
		if err != nil {
			return proc.Gone(t.s.pid, fmt.Errorf("write %d bytes to shadows from %v on: %w", n, few[0].Start, err))
		}
		if got != n {
			return fmt.Errorf("write %d bytes to shadows from %v on: only %d were written", n, few[0].Start, got)
		}
		buf = buf[n:]
	}
	return nil
}

func (t *Settler) buffer(n uint64) []byte {
	if uint64(cap(t.buf)) < n {
		t.buf = make([]byte, settlePiece)
	}
	return t.buf[:n]
}

// blank takes out of the shadows what they have where the mapping shows zeros.
// A shadow that is locked (mlockall(2) with MCL_FUTURE) does not allow that, and is
// unlocked; in its place it is locked again if it has to be.
func (t *Settler) blank(tid int, list []found, zeroed *page.Set) error {
	b := t.target.Batch()
	call := func(nr uintptr, args ...uint64) error {
		const most = 1000
		b.Call(nr, args...)
		if b.Len() < most {
			return nil
		}
		full := b
		b = t.target.Batch()
		return full.Run(tid)
	}
	for i := range list {
		f := &list[i]
		s := from(f.Range, f.shadow)
		if has(f.flags, "lo") {
			if err := call(unix.SYS_MUNLOCK, uint64(s.Start), s.Bytes()); err != nil {
				return err
			}
		}
		gone, err := t.there(zeroed.Intersect(s))
		if err != nil {
			return err
		}
		own, err := t.ownOf(f, gone)
		if err != nil {
			return err
		}
		for _, z := range gone {
			for _, g := range own.Gaps(from(z, f.Start+z.Start-s.Start)) {
				if err := call(unix.SYS_MADVISE, uint64(s.Start+g.Start-f.Start), g.Bytes(), unix.MADV_DONTNEED); err != nil {
					return err
				}
			}
		}
	}
	if b.Len() == 0 {
		b.Discard()
		return nil
	}
	return b.Run(tid)
}

// there is what of rs, which ascend, is in the process's memory.
func (t *Settler) there(rs []page.Range) ([]page.Range, error) {
	if len(rs) == 0 {
		return nil, nil
	}
	all := page.NewSet(rs...)
	var there page.Set
	err := t.pm.Kinds(page.Range{Start: rs[0].Start, End: rs[len(rs)-1].End}, func(r page.Range, _ proc.PageKind) {
		for _, x := range all.Intersect(r) {
			there.Add(x)
		}
	})
	return there.Ranges(), err
}
