package fds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
)

// RestoreContext is what Restore works on. The caller owns all of it.
type RestoreContext struct {
	Target  *inject.Target
	TID     int // the thread that makes the calls: the leader
	PID     int // of the skeleton, in our pid namespace
	Image   *image.Image
	Process *image.Process
	// MemoryFD names, for objects of Image.Memories that the skeleton has
	// mapped, a descriptor of it, at least 1000. Restore closes them.
	MemoryFD map[int]int
	// Keep are further descriptors of the target that Restore must not close.
	Keep []int
	// Addresses maps addresses of the source to those of this host: "10.0.0.1"
	// or "10.0.0.1:6379" to the same form.
	Addresses map[string]string
	Log       *slog.Logger

	// Created are the paths that Restore has made in file systems (unix
	// sockets, FIFOs): whoever ends the process before it ran removes them.
	// When Restore fails it has removed them itself.
	Created []string
}

// Restore makes the descriptor table of the target what Process.FDs says, and
// nothing else: what was open before is closed, but for Keep. Threads that
// signals go to must be there. It may change the dumpable attribute and the
// parent death signal, which are to be set afterwards, and it puts the POSIX
// locks in place last: closing any further descriptor of a locked file in the
// target would drop them.
func Restore(ctx context.Context, r *RestoreContext) (err error) {
	m := newMaker(r)
	defer func() {
		m.close()
		if err != nil {
			for _, p := range m.created {
				_ = os.Remove(p)
			}
			err = fmt.Errorf("restore descriptors of process %d: %w", r.PID, err)
			return
		}
		r.Created = append(r.Created, m.created...)
	}()
	p, err := newPlan(r)
	if err != nil {
		return err
	}
	undo, err := raiseLimit(r.PID, p.top+len(p.files)+len(r.Keep)+64)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, undo()) }()

	pidfd, err := unix.PidfdOpen(r.PID, 0)
	if err != nil {
		return fmt.Errorf("open it: %w", err)
	}
	defer unix.Close(pidfd)
	link, err := p.openPairs(pidfd, m)
	if err != nil {
		return err
	}
	defer unix.Close(link)
	for _, i := range p.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.make(i); err != nil {
			return fmt.Errorf("descriptor %d: %w", p.anyNumber(i), err)
		}
	}
	if err := m.finish(p.files); err != nil {
		return err
	}
	if err := send(link, m, p.files); err != nil {
		return err
	}
	return p.install(m)
}

// raiseLimit lets the target have that many descriptors until undo is called.
func raiseLimit(pid, n int) (undo func() error, err error) {
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		return nil, fmt.Errorf("read its limit of descriptors: %w", err)
	}
	if old.Cur >= uint64(n) {
		return func() error { return nil }, nil
	}
	raised := unix.Rlimit{Cur: uint64(n), Max: max(old.Max, uint64(n))}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &raised, nil); err != nil {
		return nil, fmt.Errorf("raise its limit of descriptors to %d: %w", n, err)
	}
	return func() error {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			return fmt.Errorf("put its limit of descriptors back: %w", err)
		}
		return nil
	}, nil
}

// plan is what goes where.
type plan struct {
	r      *RestoreContext
	files  []int         // of Image.Files, in order of making
	wanted map[int]int   // number -> file
	nums   map[int][]int // file -> its numbers, ascending
	base   int           // helpers are base + position in files
	top    int
	pairs  [][2]int // files whose unix socket the target makes; [1] may be -1
	euid   int      // whom SO_PEERCRED is to name
	egid   int

	occupied map[int]bool // numbers of the target before anything arrives
	socket   int          // the target's end of the link
}

func newPlan(r *RestoreContext) (*plan, error) {
	p := &plan{
		r: r, wanted: make(map[int]int), nums: make(map[int][]int),
		euid: int(r.Process.Creds.UID[1]), egid: int(r.Process.Creds.GID[1]),
	}
	highest := 999
	need := make(map[int]bool)
	var add func(i int)
	add = func(i int) {
		if need[i] {
			return
		}
		need[i] = true
		for _, it := range r.Image.Files[i].Epoll {
			highest = max(highest, it.FD)
			add(it.File)
		}
	}
	for _, d := range r.Process.FDs {
		highest = max(highest, d.Num)
		p.wanted[d.Num] = d.File
		p.nums[d.File] = append(p.nums[d.File], d.Num)
		add(d.File)
	}
	for i := range need {
		p.files = append(p.files, i)
	}
	// Watches come last, so that they see nothing of the making.
	slices.SortFunc(p.files, func(a, b int) int {
		wa, wb := r.Image.Files[a].Kind == image.FileInotify, r.Image.Files[b].Kind == image.FileInotify
		switch {
		case wa == wb:
			return a - b
		case wa:
			return 1
		}
		return -1
	})
	for _, k := range r.Keep {
		if _, clash := p.wanted[k]; clash {
			return nil, fmt.Errorf("descriptor %d is to be kept and is wanted by the image", k)
		}
		highest = max(highest, k)
	}
	for _, fd := range r.MemoryFD {
		highest = max(highest, fd)
	}
	for _, i := range p.files {
		s := r.Image.Files[i].Socket
		if s == nil || s.Family != unix.AF_UNIX {
			continue
		}
		switch {
		case s.State == image.SocketClosed:
			p.pairs = append(p.pairs, [2]int{i, -1})
		case s.Peer >= 0:
			o := r.Image.Files[s.Peer].Socket
			if o == nil || o.Peer != i || s.Peer == i || !need[s.Peer] {
				return nil, fmt.Errorf("descriptor %d is one end of a pair whose other end does not know it", p.anyNumber(i))
			}
			if i < s.Peer {
				p.pairs = append(p.pairs, [2]int{i, s.Peer})
			}
		}
	}
	var err error
	if p.occupied, err = numbersOf(r.PID); err != nil {
		return nil, err
	}
	for n := range p.occupied {
		highest = max(highest, n)
	}
	p.base = highest + 1 + 2*len(p.pairs) + 2
	p.top = p.base + len(p.files)
	return p, nil
}

// anyNumber is a number of the file for messages, or -1.
func (p *plan) anyNumber(i int) int {
	if n := p.nums[i]; len(n) > 0 {
		return n[0]
	}
	return -1
}

// numbersOf lists the descriptors of a process.
func numbersOf(pid int) (map[int]bool, error) {
	d, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	out := make(map[int]bool, len(names))
	for _, n := range names {
		if v, err := strconv.Atoi(n); err == nil {
			out[v] = true
		}
	}
	return out, nil
}

// asOwner makes the calls of f under the effective ids of the process, so that
// SO_PEERCRED names it.
func (p *plan) asOwner(b *inject.Batch, f func()) {
	const keep = ^uint64(0)
	change := p.euid != 0 || p.egid != 0
	var dumpable *inject.Call
	if change {
		dumpable = b.Call(unix.SYS_PRCTL, unix.PR_GET_DUMPABLE)
		b.Call(unix.SYS_SETRESGID, keep, uint64(p.egid), keep)
		b.Call(unix.SYS_SETRESUID, keep, uint64(p.euid), keep)
	}
	f()
	if change {
		b.Call(unix.SYS_SETRESUID, keep, 0, keep)
		b.Call(unix.SYS_SETRESGID, keep, 0, keep)
		// 2 cannot be set: it is what the change of ids has left.
		b.Call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0).Arg(1, dumpable).Optional()
	}
}

// openPairs makes, in the target, the link over which descriptors arrive and
// the unix socket pairs, whose ends it takes into this process. It returns our
// end of the link.
func (p *plan) openPairs(pidfd int, m *maker) (link int, err error) {
	b := p.r.Target.Batch()
	ends := b.Space(8 * (1 + len(p.pairs)))
	b.Call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0, ends.Addr())
	if len(p.pairs) > 0 {
		p.asOwner(b, func() {
			for k, pr := range p.pairs {
				b.Call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, uint64(p.r.Image.Files[pr[0]].Socket.Type)|unix.SOCK_CLOEXEC, 0,
					ends.Addr()+uint64(8*(k+1)))
			}
		})
	}
	if err := b.Run(p.r.TID); err != nil {
		return -1, fmt.Errorf("make sockets: %w", err)
	}
	raw := ends.Bytes()
	take := func(k int) (int, error) {
		n := int(le.Uint32(raw[4*k:]))
		p.occupied[n] = true
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			return -1, fmt.Errorf("take over descriptor %d: %w", n, err)
		}
		return fd, nil
	}
	p.socket = int(le.Uint32(raw))
	p.occupied[p.socket] = true
	for k, pr := range p.pairs {
		for j := range pr {
			fd, err := take(2*(k+1) + j)
			if err != nil {
				return -1, err
			}
			if pr[j] >= 0 {
				m.made[pr[j]] = fd
			} else {
				m.lost[pr[0]] = fd
			}
		}
	}
	return take(1)
}

// maxRights is SCM_MAX_FD of include/net/scm.h.
const maxRights = 253

// send hands what was made to the target, which has not asked for it yet.
func send(link int, m *maker, files []int) error {
	for part := range slices.Chunk(files, maxRights) {
		fds := make([]int, len(part))
		for k, i := range part {
			fds[k] = m.made[i]
		}
		for {
			err := unix.Sendmsg(link, []byte{0}, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return fmt.Errorf("hand over %d descriptors: %w", len(part), err)
			}
			break
		}
	}
	return nil
}
