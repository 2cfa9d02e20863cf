package fds

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// optKey names a socket option.
type optKey struct{ level, name int }

// option is one that can be read and be set from what was read.
type option struct {
	optKey
	size int
	// always: recorded even where it equals the default, because the default
	// can differ between hosts and the difference would be seen.
	always bool
	// soft: a destination that lacks it takes the socket all the same.
	soft bool
}

// Options of include/uapi/asm-generic/socket.h, linux/in.h, in6.h, tcp.h, udp.h
// and netlink.h. Their order is that of setting: what governs bind(2) comes first.
var (
	baseOptions = []option{
		{optKey{unix.SOL_SOCKET, unix.SO_REUSEADDR}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_REUSEPORT}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_BINDTODEVICE}, unix.IFNAMSIZ, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_MARK}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_DEBUG}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_KEEPALIVE}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_BROADCAST}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_OOBINLINE}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_DONTROUTE}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_LINGER}, 8, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_RCVLOWAT}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_RCVTIMEO}, 16, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_SNDTIMEO}, 16, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_PRIORITY}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_PASSCRED}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_PASSSEC}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_PASSPIDFD}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_TIMESTAMP}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_TIMESTAMPING}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_RXQ_OVFL}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_PEEK_OFF}, 4, false, false},
		{optKey{unix.SOL_SOCKET, unix.SO_NOFCS}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_SELECT_ERR_QUEUE}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_BUSY_POLL}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_PREFER_BUSY_POLL}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE}, 8, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_ZEROCOPY}, 4, false, true},
		{optKey{unix.SOL_SOCKET, unix.SO_NO_CHECK}, 4, false, false},
	}
	ipOptions = []option{
		{optKey{unix.IPPROTO_IP, unix.IP_FREEBIND}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_TRANSPARENT}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_TOS}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_TTL}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MINTTL}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RECVERR}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_PKTINFO}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RECVTTL}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RECVTOS}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RECVOPTS}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RETOPTS}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_RECVORIGDSTADDR}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_CHECKSUM}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MULTICAST_TTL}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MULTICAST_ALL}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_MULTICAST_IF}, 4, false, false},
		{optKey{unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE}, 4, false, true},
	}
	ip6Options = []option{
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY}, 4, true, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_FREEBIND}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_ALL}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_RECVERR}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_RECVORIGDSTADDR}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_TCLASS}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG}, 4, false, false},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_AUTOFLOWLABEL}, 4, false, true},
		{optKey{unix.IPPROTO_IPV6, unix.IPV6_ADDR_PREFERENCES}, 4, false, true},
	}
	tcpOptions = []option{
		{optKey{unix.IPPROTO_TCP, unix.TCP_NODELAY}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_CORK}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_MAXSEG}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_SYNCNT}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_LINGER2}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_CONGESTION}, 16, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_FASTOPEN}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_FASTOPEN_NO_COOKIE}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT}, 4, false, false},
		{optKey{unix.IPPROTO_TCP, unix.TCP_SAVE_SYN}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_INQ}, 4, false, true},
		{optKey{unix.IPPROTO_TCP, unix.TCP_TX_DELAY}, 4, false, true},
	}
	udpOptions = []option{
		{optKey{unix.IPPROTO_UDP, unix.UDP_CORK}, 4, false, false},
		{optKey{unix.IPPROTO_UDP, unix.UDP_ENCAP}, 4, false, false},
		{optKey{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_TX}, 4, false, false},
		{optKey{unix.IPPROTO_UDP, unix.UDP_NO_CHECK6_RX}, 4, false, false},
		{optKey{unix.IPPROTO_UDP, unix.UDP_SEGMENT}, 4, false, false},
		{optKey{unix.IPPROTO_UDP, unix.UDP_GRO}, 4, false, false},
	}
	netlinkOptions = []option{
		{optKey{unix.SOL_NETLINK, unix.NETLINK_PKTINFO}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_BROADCAST_ERROR}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_NO_ENOBUFS}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_CAP_ACK}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_EXT_ACK}, 4, false, false},
		{optKey{unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK}, 4, false, false},
	}
)

// SO_BUF_LOCK (since Linux 5.14) says which buffer sizes the program has set:
// the others are the kernel's to tune and must not be set.
const (
	soBufLock  = 72
	lockSndbuf = 1
	lockRcvbuf = 2
)

// optionsOf lists the options that sockets of a kind have, in order of setting.
func optionsOf(k sockKind) []option {
	out := append([]option(nil), baseOptions...)
	switch k.family {
	case unix.AF_INET6:
		out = append(append(out, ip6Options...), ipOptions...)
	case unix.AF_INET:
		out = append(out, ipOptions...)
	case unix.AF_NETLINK:
		return append(out, netlinkOptions...)
	}
	if k.family == unix.AF_INET || k.family == unix.AF_INET6 {
		switch k.kind {
		case unix.SOCK_STREAM:
			out = append(out, tcpOptions...)
		case unix.SOCK_DGRAM:
			out = append(out, udpOptions...)
		}
	}
	return out
}

// readOptions lists the options of a socket that differ from a fresh one's.
func (e *examiner) readOptions(fd int, k sockKind) ([]image.SockOpt, error) {
	fresh, err := e.freshOptions(k)
	if err != nil {
		return nil, err
	}
	var out []image.SockOpt
	for _, o := range optionsOf(k) {
		def, known := fresh[o.optKey]
		if !known {
			continue
		}
		v, err := sys.GetsockoptBytes(fd, o.level, o.name, o.size)
		if err != nil {
			continue // readable on a fresh socket, not in this state
		}
		if o.always || string(v) != def {
			out = append(out, image.SockOpt{Level: o.level, Name: o.name, Value: v})
		}
	}
	lock, err := sys.GetsockoptBytes(fd, unix.SOL_SOCKET, soBufLock, 4)
	if err != nil || len(lock) != 4 {
		return out, nil // before 5.14: left to the kernel's tuning
	}
	bits := binary.NativeEndian.Uint32(lock)
	for _, b := range []struct {
		bit  uint32
		name int
	}{{lockSndbuf, unix.SO_SNDBUF}, {lockRcvbuf, unix.SO_RCVBUF}} {
		if bits&b.bit == 0 {
			continue
		}
		v, err := sys.GetsockoptBytes(fd, unix.SOL_SOCKET, b.name, 4)
		if err != nil {
			return nil, fmt.Errorf("read buffer size: %w", err)
		}
		out = append(out, image.SockOpt{Level: unix.SOL_SOCKET, Name: b.name, Value: v})
	}
	return out, nil
}

// freshOptions reads the defaults from a socket of that kind.
func (e *examiner) freshOptions(k sockKind) (map[optKey]string, error) {
	if m, ok := e.defaults[k]; ok {
		return m, nil
	}
	fd, err := unix.Socket(k.family, k.kind|unix.SOCK_CLOEXEC, k.protocol)
	if err != nil {
		return nil, fmt.Errorf("a fresh socket to compare options with: %w", err)
	}
	defer unix.Close(fd)
	m := make(map[optKey]string)
	for _, o := range optionsOf(k) {
		if v, err := sys.GetsockoptBytes(fd, o.level, o.name, o.size); err == nil {
			m[o.optKey] = string(v)
		}
	}
	if e.defaults == nil {
		e.defaults = make(map[sockKind]map[optKey]string)
	}
	e.defaults[k] = m
	return m, nil
}

// setOptions applies what readOptions found. It returns the soft options that
// this host does not take.
func setOptions(fd int, k sockKind, opts []image.SockOpt) (lacking []string, err error) {
	soft := make(map[optKey]bool)
	known := make(map[optKey]bool)
	for _, o := range optionsOf(k) {
		known[o.optKey] = true
		soft[o.optKey] = o.soft
	}
	for _, o := range opts {
		name := o.Name
		value := o.Value
		if o.Level == unix.SOL_SOCKET && (name == unix.SO_SNDBUF || name == unix.SO_RCVBUF) {
			if len(value) != 4 {
				return nil, fmt.Errorf("buffer size of %d bytes", len(value))
			}
			// The kernel doubles what it is given; FORCE goes past the limits
			// of this host.
			half := binary.NativeEndian.Uint32(value) / 2
			value = binary.NativeEndian.AppendUint32(nil, half)
			name = unix.SO_SNDBUFFORCE
			if o.Name == unix.SO_RCVBUF {
				name = unix.SO_RCVBUFFORCE
			}
		} else if !known[optKey{o.Level, name}] {
			return nil, fmt.Errorf("socket option %d of level %d is not one that an image may have", name, o.Level)
		}
		if name == unix.SO_BINDTODEVICE && o.Level == unix.SOL_SOCKET {
			value = bytes.TrimRight(value, "\x00")
		}
		if err := sys.SetsockoptBytes(fd, o.Level, name, value); err != nil {
			if soft[optKey{o.Level, o.Name}] {
				lacking = append(lacking, fmt.Sprintf("socket option %d of level %d: %v", o.Name, o.Level, err))
				continue
			}
			if o.Level == unix.SOL_SOCKET && name == unix.SO_BINDTODEVICE {
				return nil, fmt.Errorf("bind to network device %q: %w", value, err)
			}
			return nil, fmt.Errorf("set socket option %d of level %d: %w", o.Name, o.Level, err)
		}
	}
	return lacking, nil
}
