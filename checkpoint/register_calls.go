package checkpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// registerWait is how long the process waits for the descriptor. It comes at once
// unless the host is very busy, or we have died.
var registerWait = 300 * time.Millisecond

// errNotSent: the descriptor did not come in time.
var errNotSent = errors.New("the process waited in vain for the device's descriptor; the host is too busy")

// registerAll registers rs, at once.
func (s *Session) registerAll(ctx context.Context, d Domain, rs []page.Range, reg *Registration) error {
	for wait := registerWait; ; wait *= 4 {
		err := s.tryRegister(d, rs, wait, reg)
		if !errors.Is(err, errNotSent) || wait > 4*registerWait || ctx.Err() != nil {
			return err
		}
	}
}

func (s *Session) tryRegister(d Domain, rs []page.Range, wait time.Duration, reg *Registration) error {
	leader := s.threads[0].tid
	t, err := inject.Bootstrap(s.tr, s.pid, leader)
	if err != nil {
		return err
	}
	c, err := s.registerCalls(t, d, rs, wait)
	if err == nil {
		err = c.run(s, d, leader)
	}
	inject.Point("registered")
	// The target goes before anything of ours is judged: the process is whole then.
	if err = errors.Join(err, s.closeTarget(t)); err != nil {
		return err
	}
	if c.descriptor() < 0 {
		_, err := c.received.Ret()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.EBADF) {
			_, perr := c.pair.Ret()
			return errors.Join(fmt.Errorf("%w: %w", errNotSent, err), perr)
		}
		return errors.Join(errors.New("the process was not given the device's descriptor"), err)
	}
	c.results(reg)
	return nil
}

// registration is the batch of calls by which the process registers its memory.
type registration struct {
	b                                *inject.Batch
	rs                               []page.Range
	pair, received                   *inject.Call
	regs                             []*inject.Call
	number, sockets, poll, ctl, keys *inject.Out
	old                              unix.Rlimit // of locked memory
}

// Where things are in a message with one descriptor: struct msghdr and cmsghdr of
// <bits/socket.h>.
const (
	msghdrSize    = 56
	msghdrIov     = 16
	msghdrControl = 32
	cmsgData      = 16
	cmsgSpace     = 24
	none          = ^uint32(0) // no descriptor
)

// registerCalls prepares the batch. No call of it ends the batch, for the last ones
// must be made: close of what is not there does nothing. The first dup tells us that
// the sockets are there; never 0, which is what stands there before.
func (s *Session) registerCalls(t *inject.Target, d Domain, rs []page.Range, wait time.Duration) (*registration, error) {
	b := t.Batch()
	c := &registration{b: b, rs: rs}
	if err := unix.Prlimit(s.pid, unix.RLIMIT_MEMLOCK, nil, &c.old); err != nil {
		b.Discard()
		return nil, os.NewSyscallError("prlimit", err)
	}
	le := binary.LittleEndian
	c.number, c.sockets, c.poll, c.ctl = b.Space(8), b.Space(8), b.Space(8), b.Space(cmsgSpace)
	sockets := [2]uint64{c.sockets.Addr(), c.sockets.Addr() + 4}
	device := c.ctl.Addr() + cmsgData
	le.PutUint32(c.sockets.Bytes(), none)
	le.PutUint32(c.sockets.Bytes()[4:], none)
	le.PutUint32(c.ctl.Bytes()[cmsgData:], none)
	le.PutUint32(c.poll.Bytes(), none) // struct pollfd
	le.PutUint16(c.poll.Bytes()[4:], unix.POLLIN)
	iov := b.Space(16) // struct iovec
	le.PutUint64(iov.Bytes(), b.Space(8).Addr())
	le.PutUint64(iov.Bytes()[8:], 1)
	msg := make([]byte, msghdrSize)
	le.PutUint64(msg[msghdrIov:], iov.Addr())
	le.PutUint64(msg[msghdrIov+8:], 1)
	le.PutUint64(msg[msghdrControl:], c.ctl.Addr())
	le.PutUint64(msg[msghdrControl+8:], cmsgSpace)
	ts := le.AppendUint64(nil, uint64(wait/time.Second)) // struct timespec
	ts = le.AppendUint64(ts, uint64(wait%time.Second))

	c.pair = b.Call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0, c.sockets.Addr()).Optional()
	ours := b.Call(unix.SYS_FCNTL, 0, unix.F_DUPFD_CLOEXEC, 3).ArgAt32(0, sockets[1]).Optional().StoreAt(c.number.Addr())
	theirs := b.Call(unix.SYS_FCNTL, 0, unix.F_DUPFD_CLOEXEC, 3).ArgAt32(0, sockets[0]).Optional().StoreAt32(c.poll.Addr())
	b.Call(unix.SYS_PPOLL, c.poll.Addr(), 1, b.Bytes(ts), 0).Optional()
	c.received = b.Call(unix.SYS_RECVMSG, 0, b.Bytes(msg), unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT).ArgAt32(0, sockets[0]).Optional()
	b.Call(unix.SYS_CLOSE, 0).Arg(0, ours).Optional()
	b.Call(unix.SYS_CLOSE, 0).Arg(0, theirs).Optional()
	b.Call(unix.SYS_CLOSE, 0).ArgAt32(0, sockets[0]).Optional()
	b.Call(unix.SYS_CLOSE, 0).ArgAt32(0, sockets[1]).Optional()
	c.regCalls(d, device)
	if c.raises() {
		lim := le.AppendUint64(le.AppendUint64(nil, c.old.Cur), c.old.Max)
		b.Call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_MEMLOCK, b.Bytes(lim), 0).Optional()
	}
	b.Call(unix.SYS_CLOSE, 0).ArgAt32(0, device).Optional()
	return c, nil
}

// regCalls adds those that register, by the descriptor that stands at device.
func (c *registration) regCalls(d Domain, device uint64) {
	result, input, command := sys.SizeOf[sys.UverbsMRResult](), sys.SizeOf[sys.UverbsMR](), sys.SizeOf[sys.UverbsCommand]()
	c.keys = c.b.Space(len(c.rs) * result)
	var in, cmds []byte
	for _, r := range c.rs {
		mr := sys.UverbsMR{Start: uint64(r.Start), Length: r.Bytes(), HCAVA: uint64(r.Start), PD: d.ID, Access: sys.UverbsRemoteRead}
		in = append(in, sys.AsBytes(&mr)...)
	}
	from := c.b.Bytes(in)
	for i := range c.rs {
		cmd := sys.NewUverbsCommand(d.Driver, sys.UverbsRegMR, from+uint64(i*input), input, c.keys.Addr()+uint64(i*result), result)
		cmds = append(cmds, sys.AsBytes(&cmd)...)
	}
	at := c.b.Bytes(cmds)
	for i := range c.rs {
		c.regs = append(c.regs, c.b.Call(unix.SYS_IOCTL, 0, uint64(sys.RDMA_VERBS_IOCTL), at+uint64(i*command)).ArgAt32(0, device).Optional())
	}
}

func (c *registration) raises() bool { return c.old.Cur != unix.RLIM_INFINITY }

// raise raises the limit of locked memory: as far as it goes where we may not do more
// (CAP_SYS_RESOURCE). What is beyond it is refused, region by region.
func (c *registration) raise(pid int) error {
	if !c.raises() {
		return nil
	}
	err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, nil)
	if err == unix.EPERM {
		err = unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: c.old.Max, Max: c.old.Max}, nil)
	}
	inject.Point("memlock")
	return os.NewSyscallError("prlimit", err)
}

// run has the leader make the calls while we send it the descriptor.
func (c *registration) run(s *Session, d Domain, leader int) error {
	others := make([]int, 0, len(s.threads))
	for _, th := range s.threads[1:] {
		others = append(others, th.tid)
	}
	ran, sent := make(chan error, 1), make(chan error, 1)
	go func() { sent <- s.sendDevice(d.File, page.Addr(c.number.Addr()), ran) }()
	// Not before that is certain: the call that puts it back will be made then.
	err := c.b.RunAlone(leader, others, func() error { return c.raise(s.pid) })
	close(ran)
	serr := <-sent
	var now unix.Rlimit
	if perr := unix.Prlimit(s.pid, unix.RLIMIT_MEMLOCK, nil, &now); perr == nil && now != c.old {
		// It could not do so itself.
		err = errors.Join(err, os.NewSyscallError("prlimit", unix.Prlimit(s.pid, unix.RLIMIT_MEMLOCK, &c.old, nil)))
	}
	if err == nil && !errors.Is(serr, unix.EBADF) { // that is too late, which the process says as well
		err = serr
	}
	return err
}

// sendDevice sends the descriptor to the process, by the socket whose number appears at at.
func (s *Session) sendDevice(f *os.File, at page.Addr, ran <-chan error) error {
	socket, err := s.fetch(at, ran, "socket:[")
	if err != nil {
		return err
	}
	defer socket.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.Sendmsg(int(socket.Fd()), []byte{0}, unix.UnixRights(int(fd)), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
	if serr == unix.ECONNREFUSED || serr == unix.EPIPE || serr == unix.ENOTCONN {
		serr = unix.EBADF // it has closed its end by now
	}
	return errors.Join(err, os.NewSyscallError("sendmsg", serr))
}

// descriptor is the number that the device had in the process, -1 for none.
func (c *registration) descriptor() int32 {
	return int32(binary.LittleEndian.Uint32(c.ctl.Bytes()[cmsgData:]))
}

func (c *registration) results(reg *Registration) {
	size := sys.SizeOf[sys.UverbsMRResult]()
	for i, r := range c.rs {
		if _, err := c.regs[i].Ret(); err != nil {
			reg.Refused = append(reg.Refused, Refusal{r, registerError(r, err)})
			continue
		}
		res, _ := sys.FromBytes[sys.UverbsMRResult](c.keys.Bytes()[i*size:])
		reg.Regions = append(reg.Regions, Region{r, res.Handle, res.RKey})
	}
}
