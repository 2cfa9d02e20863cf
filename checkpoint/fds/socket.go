package fds

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// sockKind is what socket(2) is called with.
type sockKind struct{ family, kind, protocol int }

// TCP states of include/net/tcp_states.h.
const (
	tcpEstablished = 1
	tcpClose       = 7
	tcpListen      = 10
)

// families that are refused, by name.
var families = map[int]string{
	unix.AF_PACKET:    "a packet socket",
	unix.AF_XDP:       "an XDP socket",
	unix.AF_VSOCK:     "a virtual machine socket",
	unix.AF_ALG:       "a crypto socket",
	unix.AF_BLUETOOTH: "a bluetooth socket",
	unix.AF_CAN:       "a CAN socket",
	unix.AF_TIPC:      "a TIPC socket",
	unix.AF_KCM:       "a KCM socket",
	unix.AF_SMC:       "an SMC socket",
	unix.AF_RDS:       "an RDS socket",
	unix.AF_QIPCRTR:   "a QRTR socket",
	unix.AF_KEY:       "a PF_KEY socket",
}

func (e *examiner) describeSocket(f *file) error {
	f.open.Kind, f.kind = image.FileSocket, "socket"
	ino, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(f.link, "socket:["), "]"), 10, 32)
	if err != nil {
		f.refuse("a socket of an unknown kind")
		return nil
	}
	f.inode = uint32(ino)
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var k sockKind
	for _, o := range []struct {
		name int
		to   *int
	}{{unix.SO_DOMAIN, &k.family}, {unix.SO_TYPE, &k.kind}, {unix.SO_PROTOCOL, &k.protocol}} {
		if *o.to, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, o.name); err != nil {
			return fmt.Errorf("read its kind: %w", err)
		}
	}
	s := &image.Socket{Family: k.family, Type: k.kind, Protocol: k.protocol, Peer: -1}
	f.open.Socket = s
	if s.Local, err = sys.Sockname(fd); err != nil {
		s.Local = nil
	}
	if s.Remote, err = sys.Peername(fd); err != nil {
		s.Remote = nil
	}
	switch k.family {
	case unix.AF_INET, unix.AF_INET6:
		err = e.describeInet(f, fd, k)
	case unix.AF_UNIX:
		f.kind = "unix"
		err = e.describeUnix(f, fd)
	case unix.AF_NETLINK:
		f.kind = "netlink"
		err = e.describeNetlink(f, fd)
	default:
		name, ok := families[k.family]
		if !ok {
			name = fmt.Sprintf("a socket of family %d", k.family)
		}
		f.what = name
		f.refuse("%s cannot be carried", name)
		return nil
	}
	if err != nil || len(f.reasons) > 0 {
		return err
	}
	if n, err := sys.FilterLength(fd); errors.Is(err, unix.EACCES) {
		f.refuse("has a BPF socket filter")
	} else if err == nil && n > 0 {
		f.refuse("has a socket filter of %d instructions", n)
	}
	if s.State != image.SocketClosed {
		opts, err := e.readOptions(fd, k)
		if err != nil {
			return err
		}
		s.Options = append(s.Options, opts...)
	}
	return e.owner(f, fd)
}

func (e *examiner) describeInet(f *file, fd int, k sockKind) error {
	s := f.open.Socket
	at := addrString(s.Local)
	f.what = at
	if s.Remote != nil {
		f.what += " - " + addrString(s.Remote)
	}
	local, _ := inetAddr(s.Local)
	unbound := local.Port() == 0 && local.Addr().IsUnspecified()
	switch {
	case k.kind == unix.SOCK_DGRAM && (k.protocol == unix.IPPROTO_UDP || k.protocol == 0):
		f.kind = "udp"
		switch {
		case s.Remote != nil:
			s.State, f.state = image.SocketConnected, "connected"
		case unbound:
			s.State, f.state = image.SocketFresh, "unbound"
		default:
			s.State, f.state = image.SocketBound, "bound"
		}
		if g := memberships(fd, k.family); len(g) > 0 {
			f.refuse("is a member of multicast groups: %s", strings.Join(g, ", "))
		}
		if n, err := unix.IoctlGetInt(fd, unix.SIOCINQ); err == nil && n > 0 {
			f.note("datagrams that wait unread are dropped, as the network may")
		}
	case k.kind == unix.SOCK_STREAM && (k.protocol == unix.IPPROTO_TCP || k.protocol == 0):
		f.kind = "tcp"
		return e.describeTCP(f, fd, unbound)
	case k.protocol == unix.IPPROTO_MPTCP:
		f.refuse("a multipath TCP socket")
	case k.protocol == unix.IPPROTO_SCTP:
		f.refuse("an SCTP socket")
	case k.kind == unix.SOCK_RAW:
		f.refuse("a raw socket of protocol %d", k.protocol)
	default:
		f.refuse("a socket of type %d and protocol %d", k.kind, k.protocol)
	}
	return nil
}

func (e *examiner) describeTCP(f *file, fd int, unbound bool) error {
	s := f.open.Socket
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("read its state: %w", err)
	}
	f.state = tcpStates[int(info.State)]
	switch info.State {
	case tcpListen:
		s.State = image.SocketListening
		s.Backlog = int(info.Sacked) // tcp_get_info: sk_max_ack_backlog
		if info.Unacked > 0 {
			f.note("%d connections that were not accepted yet are dropped", info.Unacked)
		}
	case tcpClose:
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
		if _, err := unix.Poll(p, 0); err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		switch {
		case p[0].Revents&(unix.POLLRDHUP|unix.POLLERR) != 0:
			s.State, f.state = image.SocketClosed, "dead"
			s.Reset = p[0].Revents&unix.POLLERR != 0
		case unbound:
			s.State, f.state = image.SocketFresh, "unbound"
		default:
			s.State, f.state = image.SocketBound, "bound"
		}
	default:
		if !e.tcpClose {
			f.refuse("an established TCP connection (%s): close it, or allow that it is reset (--tcp close)", f.state)
			return nil
		}
		s.State, s.Reset = image.SocketClosed, true
		f.note("the connection is reset at the switch (--tcp close)")
	}
	return nil
}

var tcpStates = map[int]string{
	1: "established", 2: "syn-sent", 3: "syn-received", 4: "fin-wait-1", 5: "fin-wait-2", 6: "time-wait",
	7: "closed", 8: "close-wait", 9: "last-ack", 10: "listening", 11: "closing", 12: "syn-received",
}

func (e *examiner) describeNetlink(f *file, fd int) error {
	s := f.open.Socket
	f.what = fmt.Sprintf("netlink protocol %d", s.Protocol)
	switch s.Protocol {
	case unix.NETLINK_ROUTE, unix.NETLINK_KOBJECT_UEVENT, unix.NETLINK_GENERIC, unix.NETLINK_SOCK_DIAG, unix.NETLINK_AUDIT:
	default:
		f.refuse("a netlink socket of protocol %d", s.Protocol)
		return nil
	}
	s.State = image.SocketFresh
	if len(s.Local) >= 12 && (anyOf(s.Local[4:12])) {
		s.State = image.SocketBound
	}
	s.Remote = nil
	one := make([]byte, 1)
	if _, _, err := unix.Recvfrom(fd, one, unix.MSG_PEEK|unix.MSG_DONTWAIT); err == nil {
		if e.content {
			f.refuse("has unread messages of the kernel, which cannot be carried: try again when the program has read them")
		} else {
			f.note("has unread messages of the kernel, which cannot be carried")
		}
	} else if !errors.Is(err, unix.EAGAIN) {
		f.note("reports %v", err)
	}
	groups, err := sys.GetsockoptBytes(fd, unix.SOL_NETLINK, unix.NETLINK_LIST_MEMBERSHIPS, 512)
	if err == nil && anyOf(groups) {
		s.State = image.SocketBound
		s.Options = append(s.Options, image.SockOpt{
			Level: unix.SOL_NETLINK, Name: unix.NETLINK_LIST_MEMBERSHIPS, Value: groups,
		})
	}
	return nil
}

func anyOf(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return true
		}
	}
	return false
}
