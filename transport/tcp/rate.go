package tcp

import (
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// DeliveryRate is what the path carried lately for this connection, in bytes per
// second, as the kernel measures it between acknowledgements: a burst shows it also
// where the connection idles in between (tcp(7), TCP_INFO; kernel: net/ipv4/
// tcp_rate.c). 0 where it is not known.
func (s *sock) DeliveryRate() float64 {
	if !s.enter() {
		return 0
	}
	defer s.leave()
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return float64(info.Delivery_rate)
}

// DeliveryRate is that of the connection beneath.
func (t *tlsStream) DeliveryRate() float64 { return t.sock.DeliveryRate() }

// Remote is the address of the other end's host.
func (s *sock) Remote() netip.Addr {
	a, ok := s.other.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap()
}

// Remote is that of the connection beneath.
func (t *tlsStream) Remote() netip.Addr { return t.sock.Remote() }
