package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"strings"
)

// modules are loaded at boot, with all that they need. Some are part of the
// kernel in some kernels.
var modules = []string{
	// The root: the host's / by 9P, and a layer over it.
	"virtio_pci", "9pnet_virtio", "9p", "overlay",
	// soft-RoCE. Its checksums are looked up by name.
	"ib_uverbs", "rdma_cm", "rdma_ucm", "rdma_rxe", "crc32_generic", "crc32_pclmul", "crc32c_intel",
	// Networks, slow and lossy ones too.
	"veth", "dummy", "tun", "sch_netem",
	"fuse",
	// What capturing sockets asks: sock_diag(7).
	"inet_diag", "tcp_diag", "udp_diag", "unix_diag", "af_packet_diag", "netlink_diag",
	// Firewalls.
	"nfnetlink", "nf_tables", "nf_conntrack", "nf_conntrack_netlink", "nft_ct", "nft_compat",
	"ip_tables", "iptable_filter", "ip6_tables", "ip6table_filter", "xt_mark", "xt_connmark", "xt_conntrack",
}

// moduleName is the name by which modules are known to each other.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// module is one, decompressed.
type module struct {
	name string
	data []byte
}

// order returns the wanted modules and those they need, which come first. That a
// module that is wanted is not there is an error.
func (p *contents) order(ctx context.Context, wanted []string) ([]module, error) {
	var out []module
	seen := map[string]bool{}
	var visit func(name, by string, must bool) error
	visit = func(name, by string, must bool) error {
		name = moduleName(name)
		if seen[name] || p.builtin[name] {
			return nil
		}
		seen[name] = true
		c, ok := p.modules[name]
		if !ok && !must {
			return nil
		}
		if !ok {
			return fmt.Errorf("it has no module %s, which %s: a kernel of another flavour?", name, by)
		}
		data, err := c.open(ctx)
		if err != nil {
			return err
		}
		needs, likes := needed(data)
		for _, n := range needs {
			if err := visit(n, name+" needs", true); err != nil {
				return err
			}
		}
		for _, n := range likes {
			if err := visit(n, "", false); err != nil {
				return err
			}
		}
		out = append(out, module{name, unsigned(data)})
		return nil
	}
	for _, name := range wanted {
		if err := visit(name, "the guest needs", true); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// unsigned returns a module without its signature, which the kernel would check
// for longer than it takes to load it: Documentation/admin-guide/module-signing.rst,
// include/linux/module_signature.h.
func unsigned(data []byte) []byte {
	const mark = "~Module signature appended~\n"
	const info = 12 // struct module_signature, which ends with the signature's length
	end := len(data) - len(mark)
	if end < info || string(data[end:]) != mark {
		return data
	}
	n := int64(end-info) - int64(binary.BigEndian.Uint32(data[end-4:end]))
	if n < 0 {
		return data
	}
	return data[:n]
}

// needed reads from a module's section .modinfo, which is strings of KEY=VALUE,
// what must be loaded before it, and what should be (softdep: modprobe.d(5)).
func needed(data []byte) (needs, likes []string) {
	for _, v := range modinfo(data, "depends") {
		for name := range strings.SplitSeq(v, ",") {
			if name != "" {
				needs = append(needs, name)
			}
		}
	}
	for _, v := range modinfo(data, "softdep") {
		before := false
		for _, word := range strings.Fields(v) {
			switch {
			case strings.HasSuffix(word, ":"):
				before = word == "pre:"
			case before:
				likes = append(likes, word)
			}
		}
	}
	return needs, likes
}

// modinfo returns the values of a key. They are looked for in the whole file,
// between zero bytes.
func modinfo(data []byte, key string) (values []string) {
	mark := []byte("\x00" + key + "=")
	for {
		i := bytes.Index(data, mark)
		if i < 0 {
			return values
		}
		data = data[i+len(mark):]
		end := bytes.IndexByte(data, 0)
		if end < 0 {
			return values
		}
		values = append(values, string(data[:end]))
		data = data[end:]
	}
}
