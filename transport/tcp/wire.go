package tcp

import (
	"net"

	"golang.org/x/sys/unix"
)

const (
	// packetHeaders is Ethernet (14), IPv4 (20) and TCP with timestamps (32), as
	// the counters of a network device and the shapers of tc count. Preamble,
	// checksum and gap of Ethernet are 24 more on the cable.
	packetHeaders = 14 + 20 + 32
	ip6More       = 20

	// A record of TLS 1.3 holds at most 16 KiB and has 5 bytes of header, one of
	// type and a tag of 16 (RFC 8446, 5.2).
	recordSize    = 16 << 10
	recordHeaders = 5 + 1 + 16

	usualSegment = 1448 // of an MTU of 1500
)

// OnWire is how many bytes n bytes of a batch become on the network, headers of
// packets included. Acknowledgements and what is sent again are not.
func (s *sock) OnWire(n int) int {
	headers := packetHeaders
	if a, ok := s.local.(*net.TCPAddr); ok && a.IP.To4() == nil {
		headers += ip6More
	}
	segment := s.segment()
	return n + (n+segment-1)/segment*headers
}

// segment is how much a packet carries now: it follows the path's MTU.
func (s *sock) segment() int {
	if !s.enter() {
		return usualSegment
	}
	defer s.leave()
	// The kernel's mss_cache, options taken off (tcp_current_mss).
	n, err := unix.GetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG)
	if err != nil || n <= 0 {
		return usualSegment
	}
	return n
}

// OnWire is the same with the headers of records: header and meta of a frame are
// one by themselves.
func (t *tlsStream) OnWire(n int) int {
	return t.sock.OnWire(n + (n/recordSize+2)*recordHeaders)
}
