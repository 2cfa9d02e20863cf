package sys

import (
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxSockaddr is sizeof(struct sockaddr_storage).
const maxSockaddr = 128

// GetsockoptBytes reads a socket option in its raw form. The result is a part
// of a new buffer of size bytes.
func GetsockoptBytes(fd, level, name, size int) ([]byte, error) {
	b := make([]byte, max(size, 1))
	n := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return nil, errno
	}
	return b[:min(int(n), size)], nil
}

// SetsockoptBytes sets a socket option from its raw form.
func SetsockoptBytes(fd, level, name int, value []byte) error {
	var p unsafe.Pointer
	if len(value) > 0 {
		p = unsafe.Pointer(&value[0])
	}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(p), uintptr(len(value)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Sockname is getsockname(2) with the address as struct sockaddr bytes.
func Sockname(fd int) ([]byte, error) { return sockname(unix.SYS_GETSOCKNAME, fd) }

// Peername is getpeername(2) with the address as struct sockaddr bytes.
func Peername(fd int) ([]byte, error) { return sockname(unix.SYS_GETPEERNAME, fd) }

func sockname(nr uintptr, fd int) ([]byte, error) {
	b := make([]byte, maxSockaddr)
	n := uint32(len(b))
	_, _, errno := unix.Syscall(nr, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return nil, errno
	}
	return b[:min(int(n), len(b))], nil
}

// BindRaw is bind(2) with the address as struct sockaddr bytes.
func BindRaw(fd int, addr []byte) error { return withAddr(unix.SYS_BIND, fd, addr) }

// ConnectRaw is connect(2) with the address as struct sockaddr bytes.
func ConnectRaw(fd int, addr []byte) error { return withAddr(unix.SYS_CONNECT, fd, addr) }

func withAddr(nr uintptr, fd int, addr []byte) error {
	if len(addr) < 2 {
		return unix.EINVAL
	}
	for {
		_, _, errno := unix.Syscall(nr, uintptr(fd), uintptr(unsafe.Pointer(&addr[0])), uintptr(len(addr)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// FilterLength is how many instructions the socket filter of fd has, 0 without
// one (SO_GET_FILTER counts instructions where others count bytes).
func FilterLength(fd int) (int, error) {
	var n uint32
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER,
		0, uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// mcastMSFilter is MCAST_MSFILTER of include/uapi/linux/in.h.
const mcastMSFilter = 48

// groupFilter is struct group_filter of the same header, with no room for
// sources.
type groupFilter struct {
	_         structs.HostLayout
	Interface uint32
	_         uint32
	Group     [maxSockaddr]byte // struct __kernel_sockaddr_storage
	Mode      uint32
	Sources   uint32
}

// IsMember reports whether a socket has joined a multicast group, given as
// struct sockaddr bytes, on the network device with that index. level is
// IPPROTO_IP or IPPROTO_IPV6.
func IsMember(fd, level, index int, group []byte) bool {
	f := groupFilter{Interface: uint32(index)}
	copy(f.Group[:], group)
	n := uint32(unsafe.Sizeof(f))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), mcastMSFilter,
		uintptr(unsafe.Pointer(&f)), uintptr(unsafe.Pointer(&n)), 0)
	return errno == 0
}
