package checkpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// mostShadows is how many are there at once: what the note tells of, and a stop
// can make.
const mostShadows = 128

// A note lists where shadows are made: their number, then start and end of each.
func note(rs []page.Range) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(rs)))
	for _, r := range rs {
		b = binary.LittleEndian.AppendUint64(b, uint64(r.Start))
		b = binary.LittleEndian.AppendUint64(b, uint64(r.End))
	}
	return b
}

func noted(b []byte) (out []page.Range) {
	if len(b) < 8 {
		return nil
	}
	n := binary.LittleEndian.Uint64(b)
	for b = b[8:]; n > 0 && len(b) >= 16; b = b[16:] {
		r := page.Range{Start: page.Addr(binary.LittleEndian.Uint64(b)), End: page.Addr(binary.LittleEndian.Uint64(b[8:]))}
		if r.Aligned() && !r.Empty() {
			out = append(out, r)
		}
		n--
	}
	return out
}

// shadowsIn lists what of r is still a shadow that was made there. They carry
// MADV_DONTFORK, so that children do not inherit them, until the moment in which they
// move away: what else the program may have mapped there since has not.
func (t *Settler) shadowsIn(r page.Range) (out []page.Range) {
	for i := range t.maps {
		m := &t.maps[i]
		if m.Overlaps(r) && !m.Shared && m.Has("dc") {
			out = append(out, m.Intersect(r))
		}
	}
	return out
}

// makeShadows maps a shadow for each piece, as long as itself, in a place where
// nothing is. Those that get none are reported.
func (t *Settler) makeShadows(ctx context.Context, few []piece) (made []piece, err error) {
	rs := make([]page.Range, len(few))
	hole := t.widest()
	at := hole.Start + page.Addr(hole.Bytes()/2)
	for i := range few {
		const table = 2 << 20
		at = (at+table-1)&^(table-1) + few[i].Start&(table-1)
		rs[i] = from(few[i].Range, at)
		at = rs[i].End + page.Size
	}
	if at > hole.End {
		return nil, fmt.Errorf("no room for %d shadows in its address space", len(few))
	}
	calls := make([]*inject.Call, len(few))
	err = t.again(ctx, func(tids []int) error {
		if err := t.writeNote(rs); err != nil {
			return err
		}
		inject.Point("settle-noted")
		b := t.target.Batch()
		for i, r := range rs {
			calls[i] = mapShadow(b, &few[i], r)
			b.Call(unix.SYS_MADVISE, 0, r.Bytes(), unix.MADV_DONTFORK).Arg(0, calls[i]).Optional()
		}
		return b.Run(tids[0])
	})
	if err != nil {
		return nil, err
	}
	for i := range few {
		p := few[i]
		switch got, err := calls[i].Ret(); {
		case errors.Is(err, unix.EEXIST):
			t.rep.Retried++ // the next round looks for another place
		case err != nil && p.path != "":
			t.bad[p.path] = fmt.Errorf("open and map %s in the process: %w", p.path, err)
			t.rep.Retried++
		case err != nil:
			t.skip(&p, fmt.Errorf("make its shadow: %w", err))
		case page.Addr(got) != rs[i].Start:
			t.skip(&p, fmt.Errorf("its shadow came to %#x: %w", got, sys.ErrNotSupported)) // before Linux 4.17
		default:
			p.shadow, p.flags = rs[i].Start, []string{"dc"}
			t.made.Add(rs[i])
			if err := t.same(&p); err != nil {
				t.bad[p.path] = err
				t.rep.Retried++
				continue
			}
			made = append(made, p)
		}
	}
	return made, nil
}

// mapShadow appends the calls that map a shadow at r. A file is opened by the process
// and closed in the same batch, so that no descriptor stays whatever becomes of us.
func mapShadow(b *inject.Batch, p *piece, r page.Range) *inject.Call {
	const fixed = unix.MAP_PRIVATE | unix.MAP_FIXED_NOREPLACE
	const both = unix.PROT_READ | unix.PROT_WRITE
	if p.path != "" {
		cwd := int64(unix.AT_FDCWD)
		fd := b.Call(unix.SYS_OPENAT, uint64(cwd), b.String(p.path), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY).Optional()
		c := b.Call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), both, fixed, 0, p.offset()).Arg(4, fd).Optional()
		b.Call(unix.SYS_CLOSE, 0).Arg(0, fd).Optional()
		return c
	}
	flags := uint64(fixed | unix.MAP_ANONYMOUS)
	if p.of.Prot&unix.PROT_WRITE == 0 {
		flags |= unix.MAP_NORESERVE // it is not accounted, and need not be here
	}
	return b.Call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), both, flags, ^uint64(0), 0).Optional()
}

// same sees that the process has mapped the file that has this name here: it may have
// another root directory.
func (t *Settler) same(p *piece) error {
	if p.path == "" {
		return nil
	}
	t.look.Again()
	m, ok, err := t.look.At(p.shadow)
	if err != nil || !ok {
		return errors.Join(fmt.Errorf("%s is not mapped", p.path), err)
	}
	var there, here unix.Stat_t
	if err := unix.Stat(mapFile(t.s.pid, m.Range), &there); err != nil {
		return &os.PathError{Op: "stat", Path: mapFile(t.s.pid, m.Range), Err: err}
	}
	if err := unix.Stat(p.path, &here); err != nil {
		return &os.PathError{Op: "stat", Path: p.path, Err: err}
	}
	if there.Dev != here.Dev || there.Ino != here.Ino {
		return fmt.Errorf("%s is another file in the process's mount namespace", p.path)
	}
	p.dev, p.ino = m.Dev, m.Ino
	return nil
}

// fill puts the content of a piece into its shadow, while the process runs.
func (t *Settler) fill(ctx context.Context, p *piece) error {
	if p.path != "" || p.read == nil {
		return nil
	}
	buf := t.buffer(min(settlePiece, p.Bytes()))
	for at := page.Addr(0); at < page.Addr(p.Bytes()); {
		b := buf[:min(uint64(len(buf)), p.Bytes()-uint64(at))]
		clear(b)
		if err := p.read(ctx, p.offset()+uint64(at), b); err != nil {
			return fmt.Errorf("read %d bytes of its file from %d on: %w", len(b), p.offset()+uint64(at), err)
		}
		for i := 0; i < len(b); {
			n := 0
			for i+n < len(b) && !zero(b[i+n:][:page.Size]) {
				n += page.Size
			}
			if n > 0 {
				// By the handle: were the process another program by now, its number
				// would lead to that.
				if err := t.mem.WriteAt(b[i:i+n], p.shadow+at+page.Addr(i)); err != nil {
					return err
				}
				t.rep.Filled += uint64(n)
			}
			i += n + page.Size
		}
		at += page.Addr(len(b))
	}
	return nil
}

var zeroPage [page.Size]byte

func zero(b []byte) bool { return bytes.Equal(b, zeroPage[:]) }
