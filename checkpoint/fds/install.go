package fds

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
)

var le = binary.LittleEndian

// install receives the descriptors in the target and does there, in one batch,
// all that depends on who does it.
func (p *plan) install(m *maker) error {
	b := p.r.Target.Batch()
	arrived, outs := p.receive(b)
	helper := make(map[int]uint64, len(p.files))
	for k, i := range p.files {
		helper[i] = uint64(p.base + k)
		b.Call(unix.SYS_DUP3, uint64(arrived[k]), helper[i], unix.O_CLOEXEC)
	}
	p.registerOld(b, helper)
	for _, d := range p.r.Process.FDs {
		var flags uint64
		if d.CloseOnExec {
			flags = unix.O_CLOEXEC
		}
		b.Call(unix.SYS_DUP3, helper[d.File], uint64(d.Num), flags)
	}
	for _, i := range p.files {
		f := &p.r.Image.Files[i]
		for _, it := range f.Epoll {
			if g, ok := p.wanted[it.FD]; ok && g == it.File {
				register(b, helper[i], it)
			}
		}
		if f.Owner != nil {
			p.own(b, helper[i], i, f)
		}
	}
	p.listen(b, helper)
	p.lock(b, helper, func(kind string) bool { return kind != "POSIX" })
	p.closeRest(b)
	p.lock(b, helper, func(kind string) bool { return kind == "POSIX" })
	if err := b.Run(p.r.TID); err != nil {
		return p.explain(m, err)
	}
	return p.check(arrived, outs)
}

// registerOld makes the registrations under a number that names another file
// now, or none: the number is lent for the moment.
func (p *plan) registerOld(b *inject.Batch, helper map[int]uint64) {
	aside := make(map[int]uint64) // kept descriptors that are in the way
	for _, i := range p.files {
		for _, it := range p.r.Image.Files[i].Epoll {
			if f, ok := p.wanted[it.FD]; ok && f == it.File {
				continue
			}
			if _, moved := aside[it.FD]; !moved && slices.Contains(p.r.Keep, it.FD) {
				aside[it.FD] = uint64(p.top + len(aside))
				b.Call(unix.SYS_DUP3, uint64(it.FD), aside[it.FD], unix.O_CLOEXEC)
			}
			b.Call(unix.SYS_DUP3, helper[it.File], uint64(it.FD), unix.O_CLOEXEC)
			register(b, helper[i], it)
		}
	}
	for k, at := range aside {
		b.Call(unix.SYS_DUP3, at, uint64(k), unix.O_CLOEXEC)
	}
}

// receive adds the calls that take the descriptors in. They arrive at the lowest
// free numbers, which are known: nobody else runs in the target.
func (p *plan) receive(b *inject.Batch) (arrived []int, outs []*inject.Out) {
	next := 0
	for range p.files {
		for p.occupied[next] {
			next++
		}
		arrived = append(arrived, next)
		next++
	}
	for part := range slices.Chunk(p.files, maxRights) {
		control := b.Space(unix.CmsgSpace(4 * len(part)))
		data := b.Space(8)
		iov := le.AppendUint64(le.AppendUint64(nil, data.Addr()), 1)
		var msg []byte // struct msghdr
		msg = le.AppendUint64(msg, 0)
		msg = le.AppendUint64(msg, 0)
		msg = le.AppendUint64(msg, b.Bytes(iov))
		msg = le.AppendUint64(msg, 1)
		msg = le.AppendUint64(msg, control.Addr())
		msg = le.AppendUint64(msg, uint64(unix.CmsgSpace(4*len(part))))
		msg = le.AppendUint64(msg, 0)
		b.Call(unix.SYS_RECVMSG, uint64(p.socket), b.Bytes(msg), unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		outs = append(outs, control)
	}
	return arrived, outs
}

// check compares where the descriptors arrived with what the plan foresaw.
func (p *plan) check(arrived []int, outs []*inject.Out) error {
	k := 0
	for _, o := range outs {
		msgs, err := unix.ParseSocketControlMessage(o.Bytes())
		if err != nil || len(msgs) == 0 {
			return fmt.Errorf("descriptors did not arrive: %w", errors.Join(err, unix.EPROTO))
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil {
			return fmt.Errorf("descriptors did not arrive: %w", err)
		}
		for _, fd := range fds {
			if k >= len(arrived) || arrived[k] != fd {
				return fmt.Errorf("a descriptor arrived as %d and not where it was expected", fd)
			}
			k++
		}
	}
	if k != len(arrived) {
		return fmt.Errorf("%d of %d descriptors arrived", k, len(arrived))
	}
	return nil
}

// register adds an epoll registration; the number must name the file.
func register(b *inject.Batch, epoll uint64, it image.EpollItem) {
	ev := le.AppendUint64(le.AppendUint32(nil, it.Events), it.Data) // packed
	b.Call(unix.SYS_EPOLL_CTL, epoll, unix.EPOLL_CTL_ADD, uint64(it.FD), b.Bytes(ev))
}

// own sets who gets the signals of a file. O_ASYNC is set here because the
// number is part of what the signal tells.
func (p *plan) own(b *inject.Batch, helper uint64, i int, f *image.OpenFile) {
	num := helper
	if n := p.anyNumber(i); n >= 0 {
		num = uint64(n)
	}
	if f.Owner.PID != 0 {
		o := le.AppendUint32(le.AppendUint32(nil, uint32(f.Owner.Type)), uint32(f.Owner.PID))
		b.Call(unix.SYS_FCNTL, num, unix.F_SETOWN_EX, b.Bytes(o))
	}
	if f.Owner.Signal != 0 {
		b.Call(unix.SYS_FCNTL, num, unix.F_SETSIG, uint64(f.Owner.Signal))
	}
	if f.Flags&unix.O_ASYNC != 0 {
		b.Call(unix.SYS_FCNTL, num, unix.F_SETFL, uint64(f.Flags))
	}
}

// listen makes unix sockets listen; whoever connects is told who did it.
func (p *plan) listen(b *inject.Batch, helper map[int]uint64) {
	var which []int
	for _, i := range p.files {
		if s := p.r.Image.Files[i].Socket; s != nil && s.Family == unix.AF_UNIX && s.State == image.SocketListening {
			which = append(which, i)
		}
	}
	if len(which) == 0 {
		return
	}
	p.asOwner(b, func() {
		for _, i := range which {
			b.Call(unix.SYS_LISTEN, helper[i], uint64(p.r.Image.Files[i].Socket.Backlog))
		}
	})
}

// lock takes the locks whose kind is wanted.
func (p *plan) lock(b *inject.Batch, helper map[int]uint64, want func(kind string) bool) {
	for _, i := range p.files {
		for _, l := range p.r.Image.Files[i].Locks {
			if !want(l.Kind) {
				continue
			}
			num := uint64(p.anyNumber(i))
			if l.Kind != "POSIX" {
				num = helper[i]
			}
			if l.Kind == "FLOCK" {
				how := uint64(unix.LOCK_SH)
				if l.Write {
					how = unix.LOCK_EX
				}
				b.Call(unix.SYS_FLOCK, num, how|unix.LOCK_NB)
				continue
			}
			kind := uint16(unix.F_RDLCK)
			if l.Write {
				kind = unix.F_WRLCK
			}
			fl := le.AppendUint16(nil, kind) // struct flock
			fl = le.AppendUint16(fl, unix.SEEK_SET)
			fl = le.AppendUint32(fl, 0)
			fl = le.AppendUint64(fl, uint64(l.Start))
			fl = le.AppendUint64(fl, uint64(l.Len))
			fl = le.AppendUint64(fl, 0)
			cmd := uint64(unix.F_SETLK)
			if l.Kind == "OFDLCK" {
				cmd = unix.F_OFD_SETLK
			}
			b.Call(unix.SYS_FCNTL, num, cmd, b.Bytes(fl))
		}
	}
}

// closeRest closes all numbers but those of the table and those to be kept.
func (p *plan) closeRest(b *inject.Batch) {
	keep := slices.Clone(p.r.Keep)
	for n := range p.wanted {
		keep = append(keep, n)
	}
	slices.Sort(keep)
	from := 0
	for _, n := range keep {
		if n > from {
			b.Call(unix.SYS_CLOSE_RANGE, uint64(from), uint64(n-1), 0)
		}
		from = n + 1
	}
	b.Call(unix.SYS_CLOSE_RANGE, uint64(from), uint64(^uint32(0)), 0)
}

// explain says in words of the program's what a failed call of the batch means.
func (p *plan) explain(m *maker, err error) error {
	var ce *inject.CallError
	if !errors.As(err, &ce) {
		return err
	}
	switch ce.Nr {
	case unix.SYS_FLOCK, unix.SYS_FCNTL:
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return fmt.Errorf("a file lock that the process held is held by another one here: %w", err)
		}
	case unix.SYS_DUP3, unix.SYS_RECVMSG:
		return fmt.Errorf("place descriptors up to %d: %w", p.top, err)
	}
	return err
}
