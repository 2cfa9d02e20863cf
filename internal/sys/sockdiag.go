package sys

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// include/uapi/linux/{sock,inet,unix}_diag.h
const (
	sockDiagByFamily = 20
	sockDestroy      = 21 // since Linux 4.5, CONFIG_INET_DIAG_DESTROY

	unixDiagShowName = 1 << 0
	unixDiagShowVFS  = 1 << 1
	unixDiagShowPeer = 1 << 2
	unixDiagShowRQ   = 1 << 4

	unixDiagAttrName     = 0
	unixDiagAttrVFS      = 1
	unixDiagAttrPeer     = 2
	unixDiagAttrRQLen    = 4
	unixDiagAttrShutdown = 6

	inetDiagIDLen   = 48 // struct inet_diag_sockid
	inetDiagReqLen  = 8 + inetDiagIDLen
	inetDiagMsgLen  = 4 + inetDiagIDLen + 20
	unixDiagMsgLen  = 16
	nlmsgHeaderLen  = 16
	netlinkBufBytes = 64 << 10
)

// SockDiag is a NETLINK_SOCK_DIAG socket. It sees the network namespace of the
// thread that opened it. Not safe for concurrent use.
type SockDiag struct {
	fd  int
	seq uint32
	buf []byte
}

// OpenSockDiag opens one.
func OpenSockDiag() (*SockDiag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("socket diagnosis: %w", err)
	}
	// The kernel always answers; the limit is there so that nothing can hang.
	tv := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("socket diagnosis: %w", err)
	}
	return &SockDiag{fd: fd, buf: make([]byte, netlinkBufBytes)}, nil
}

// Close closes it.
func (d *SockDiag) Close() error { return unix.Close(d.fd) }

// UnixSocket is what the kernel tells of a socket of AF_UNIX. For a listening
// one RQueue is the number of connections that wait and WQueue the backlog, else
// they are bytes that wait and bytes sent that were not read yet.
type UnixSocket struct {
	Type     int
	State    int // TCP_* numbers: 1 established, 7 closed, 10 listening
	Inode    uint32
	Peer     uint32 // inode; 0 is none
	RQueue   uint32
	WQueue   uint32
	Shutdown int // bit 0 no more receiving, bit 1 no more sending
	Name     []byte
	VFSInode uint32 // of the path that it is bound to
}

// Unix asks for the socket with that inode. ENOENT: there is none.
func (d *SockDiag) Unix(inode uint32) (UnixSocket, error) {
	req := make([]byte, 0, 24)
	req = append(req, unix.AF_UNIX, 0, 0, 0)
	req = binary.NativeEndian.AppendUint32(req, ^uint32(0)) // all states
	req = binary.NativeEndian.AppendUint32(req, inode)
	req = binary.NativeEndian.AppendUint32(req, unixDiagShowName|unixDiagShowVFS|unixDiagShowPeer|unixDiagShowRQ)
	req = binary.NativeEndian.AppendUint64(req, ^uint64(0)) // no cookie
	var out UnixSocket
	found := false
	err := d.do(sockDiagByFamily, 0, req, func(b []byte) error {
		if len(b) < unixDiagMsgLen {
			return errShort
		}
		out.Type, out.State = int(b[1]), int(b[2])
		out.Inode = binary.NativeEndian.Uint32(b[4:])
		found = true
		return attributes(b[unixDiagMsgLen:], func(kind uint16, v []byte) {
			switch {
			case kind == unixDiagAttrName:
				out.Name = append([]byte(nil), v...)
			case kind == unixDiagAttrVFS && len(v) >= 4:
				out.VFSInode = binary.NativeEndian.Uint32(v)
			case kind == unixDiagAttrPeer && len(v) >= 4:
				out.Peer = binary.NativeEndian.Uint32(v)
			case kind == unixDiagAttrRQLen && len(v) >= 8:
				out.RQueue, out.WQueue = binary.NativeEndian.Uint32(v), binary.NativeEndian.Uint32(v[4:])
			case kind == unixDiagAttrShutdown && len(v) >= 1:
				out.Shutdown = int(v[0])
			}
		})
	})
	if err == nil && !found {
		err = unix.ENOENT
	}
	if err != nil {
		return UnixSocket{}, fmt.Errorf("socket diagnosis of unix socket %d: %w", inode, err)
	}
	return out, nil
}

// InetSocket is what the kernel tells of a socket of AF_INET or AF_INET6.
type InetSocket struct {
	Family     int
	State      int // TCP_* numbers
	LocalPort  int
	RemotePort int
	Local      [16]byte
	Remote     [16]byte
	RQueue     uint32
	WQueue     uint32
	UID        uint32
	Inode      uint32 // 0: not accepted yet, or no longer owned
	id         [inetDiagIDLen]byte
}

// Inet lists the sockets of a family and protocol whose state is in the mask
// of 1 << TCP_* bits.
func (d *SockDiag) Inet(family, protocol int, states uint32) ([]InetSocket, error) {
	req := make([]byte, inetDiagReqLen)
	req[0], req[1] = byte(family), byte(protocol)
	binary.NativeEndian.PutUint32(req[4:], states)
	var out []InetSocket
	err := d.do(sockDiagByFamily, unix.NLM_F_DUMP, req, func(b []byte) error {
		if len(b) < inetDiagMsgLen {
			return errShort
		}
		s := InetSocket{Family: int(b[0]), State: int(b[1])}
		copy(s.id[:], b[4:])
		s.LocalPort = int(binary.BigEndian.Uint16(b[4:]))
		s.RemotePort = int(binary.BigEndian.Uint16(b[6:]))
		copy(s.Local[:], b[8:])
		copy(s.Remote[:], b[24:])
		tail := b[4+inetDiagIDLen:]
		s.RQueue = binary.NativeEndian.Uint32(tail[4:])
		s.WQueue = binary.NativeEndian.Uint32(tail[8:])
		s.UID = binary.NativeEndian.Uint32(tail[12:])
		s.Inode = binary.NativeEndian.Uint32(tail[16:])
		out = append(out, s)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("socket diagnosis, family %d protocol %d: %w", family, protocol, err)
	}
	return out, nil
}

// Destroy ends a socket that Inet listed, whoever owns it: a connection is
// reset towards its peer, a listener stops listening and its waiting
// connections are reset. ENOENT: it is gone already.
func (d *SockDiag) Destroy(protocol int, s *InetSocket) error {
	req := make([]byte, inetDiagReqLen)
	req[0], req[1] = byte(s.Family), byte(protocol)
	binary.NativeEndian.PutUint32(req[4:], 1<<uint(s.State))
	copy(req[8:], s.id[:])
	if err := d.do(sockDestroy, unix.NLM_F_ACK, req, nil); err != nil {
		return fmt.Errorf("destroy socket %d: %w", s.Inode, err)
	}
	return nil
}

var errShort = errors.New("short netlink message")

// do sends one request and hands the answers to each.
func (d *SockDiag) do(kind, flags uint16, body []byte, each func([]byte) error) error {
	d.seq++
	msg := make([]byte, nlmsgHeaderLen, nlmsgHeaderLen+len(body))
	ne := binary.NativeEndian
	ne.PutUint32(msg[0:], uint32(nlmsgHeaderLen+len(body)))
	ne.PutUint16(msg[4:], kind)
	ne.PutUint16(msg[6:], unix.NLM_F_REQUEST|flags)
	ne.PutUint32(msg[8:], d.seq)
	msg = append(msg, body...)
	if err := unix.Sendto(d.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		for b := d.buf[:n]; len(b) > 0; {
			if len(b) < nlmsgHeaderLen {
				return errShort
			}
			size := int(ne.Uint32(b))
			if size < nlmsgHeaderLen || size > len(b) {
				return errShort
			}
			seq, kind, flags, payload := ne.Uint32(b[8:]), ne.Uint16(b[4:]), ne.Uint16(b[6:]), b[nlmsgHeaderLen:size]
			b = b[min((size+3)&^3, len(b)):]
			if seq != d.seq {
				continue // of an earlier request that was given up
			}
			switch kind {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if len(payload) < 4 {
					return errShort
				}
				if code := int32(ne.Uint32(payload)); code != 0 {
					return unix.Errno(-code)
				}
				return nil
			}
			if each == nil {
				continue
			}
			if err := each(payload); err != nil {
				return err
			}
			if flags&unix.NLM_F_MULTI == 0 {
				return nil
			}
		}
	}
}

func attributes(b []byte, each func(kind uint16, value []byte)) error {
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return errShort
		}
		each(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[4:size])
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}
