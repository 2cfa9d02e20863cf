package fds

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
)

// memberships lists the multicast groups that a socket has joined. The kernel
// does not list them per socket: every group of the host is tried.
func memberships(fd, family int) []string {
	var out []string
	if b, err := os.ReadFile("/proc/self/net/igmp"); err == nil {
		for _, g := range parseIGMP(string(b)) {
			if g.addr == netip.AddrFrom4([4]byte{224, 0, 0, 1}) {
				continue // every host is a member
			}
			if sys.IsMember(fd, unix.IPPROTO_IP, g.index, sockaddrOf(g.addr)) {
				out = append(out, g.addr.String())
			}
		}
	}
	if family != unix.AF_INET6 {
		return out
	}
	if b, err := os.ReadFile("/proc/self/net/igmp6"); err == nil {
		for _, g := range parseIGMP6(string(b)) {
			if sys.IsMember(fd, unix.IPPROTO_IPV6, g.index, sockaddrOf(g.addr)) {
				out = append(out, g.addr.String())
			}
		}
	}
	return out
}

type group struct {
	index int // of the network device
	addr  netip.Addr
}

func sockaddrOf(a netip.Addr) []byte {
	if a.Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = append(b, 0, 0)
		v := a.As4()
		return append(b, v[:]...)
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = append(b, 0, 0, 0, 0, 0, 0)
	v := a.As16()
	return append(b, v[:]...)
}

// parseIGMP reads /proc/net/igmp: a line for each device, and below it an
// indented one for each group, its address a hexadecimal number in host order.
func parseIGMP(s string) []group {
	var out []group
	index := 0
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if line[0] != ' ' && line[0] != '\t' {
			index, _ = strconv.Atoi(f[0])
			continue
		}
		v, err := strconv.ParseUint(f[0], 16, 32)
		if err != nil || index == 0 {
			continue
		}
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], uint32(v))
		out = append(out, group{index, netip.AddrFrom4(b)})
	}
	return out
}

// parseIGMP6 reads /proc/net/igmp6: "index name address users ...".
func parseIGMP6(s string) []group {
	var out []group
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		index, err := strconv.Atoi(f[0])
		b, err2 := hex.DecodeString(f[2])
		if err != nil || err2 != nil || len(b) != 16 {
			continue
		}
		out = append(out, group{index, netip.AddrFrom16([16]byte(b))})
	}
	return out
}
