package fds

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// familyOf is the address family of struct sockaddr bytes.
func familyOf(raw []byte) int {
	if len(raw) < 2 {
		return unix.AF_UNSPEC
	}
	return int(binary.NativeEndian.Uint16(raw))
}

// inetAddr reads a struct sockaddr_in or sockaddr_in6. The zone is left out.
func inetAddr(raw []byte) (netip.AddrPort, bool) {
	switch {
	case familyOf(raw) == unix.AF_INET && len(raw) >= 8:
		a := netip.AddrFrom4([4]byte(raw[4:8]))
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(raw[2:])), true
	case familyOf(raw) == unix.AF_INET6 && len(raw) >= 24:
		a := netip.AddrFrom16([16]byte(raw[8:24]))
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(raw[2:])), true
	}
	return netip.AddrPort{}, false
}

// putInetAddr writes an address back over raw, which must be of a family that
// can hold it.
func putInetAddr(raw []byte, a netip.AddrPort) ([]byte, error) {
	out := bytes.Clone(raw)
	binary.BigEndian.PutUint16(out[2:], a.Port())
	switch {
	case familyOf(raw) == unix.AF_INET && a.Addr().Unmap().Is4():
		v := a.Addr().Unmap().As4()
		copy(out[4:8], v[:])
	case familyOf(raw) == unix.AF_INET6 && len(raw) >= 24:
		v := a.Addr().As16() // an IPv4 address becomes a mapped one
		copy(out[8:24], v[:])
	default:
		return nil, fmt.Errorf("address %v does not fit a socket of family %d", a, familyOf(raw))
	}
	return out, nil
}

// unixPath returns the path of a struct sockaddr_un, which is empty for a
// socket without a name, and whether the name is an abstract one.
func unixPath(raw []byte) (path string, abstract bool) {
	if familyOf(raw) != unix.AF_UNIX || len(raw) <= 2 {
		return "", false
	}
	p := raw[2:]
	if p[0] == 0 {
		return string(p[1:]), true
	}
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p), false
}

// unixAddr is the struct sockaddr_un of a path.
func unixAddr(path string) ([]byte, error) {
	if len(path) > 107 {
		return nil, fmt.Errorf("path %q is longer than a socket address can be", path)
	}
	raw := binary.NativeEndian.AppendUint16(nil, unix.AF_UNIX)
	return append(append(raw, path...), 0), nil
}

// addrString is an address for people: "10.0.0.1:6379", "/run/x.sock", "@name".
func addrString(raw []byte) string {
	if a, ok := inetAddr(raw); ok {
		if a.Addr().Is4In6() {
			a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		}
		return a.String()
	}
	if p, abstract := unixPath(raw); abstract {
		return "@" + strconv.QuoteToGraphic(p)[1:len(strconv.QuoteToGraphic(p))-1]
	} else if p != "" {
		return p
	}
	return ""
}

// translate applies --address old=new. Both are an address, or an address with
// a port; the longer form is looked for first.
func translate(raw []byte, addresses map[string]string) ([]byte, error) {
	a, ok := inetAddr(raw)
	if !ok || len(addresses) == 0 {
		return raw, nil
	}
	plain := a.Addr().Unmap()
	for _, old := range []string{netip.AddrPortFrom(plain, a.Port()).String(), a.String(), plain.String(), a.Addr().String()} {
		to, ok := addresses[old]
		if !ok {
			continue
		}
		if ap, err := netip.ParseAddrPort(to); err == nil {
			return putInetAddr(raw, ap)
		}
		na, err := netip.ParseAddr(to)
		if err != nil {
			return nil, fmt.Errorf("address %q=%q: %w", old, to, err)
		}
		return putInetAddr(raw, netip.AddrPortFrom(na, a.Port()))
	}
	return raw, nil
}
