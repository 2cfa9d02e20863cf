package appliance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/rdma"
)

func checkRDMA() Finding {
	const fix = "page lanes go over TCP, or over soft-RoCE where that can be had; docs/rdma.md"
	ports, without := rdma.List()
	if len(ports)+len(without) == 0 {
		return found("RDMA", "", errors.New("no device"), VerdictOptional, fix)
	}
	if err := rdma.Available(); err != nil {
		return found("RDMA", "", err, VerdictOptional, fix)
	}
	var all []string
	usable := false
	for _, p := range ports {
		all = append(all, p.String())
		usable = usable || p.Problem == nil
	}
	for _, name := range without {
		all = append(all, name+": no RoCE v2 address")
	}
	what := strings.Join(all, "; ")
	if !usable {
		return found("RDMA", "", errors.New(what), VerdictOptional, fix)
	}
	return found("RDMA", what, nil, VerdictOptional, fix)
}

// checkPath says what leads to a peer.
func checkPath(ctx context.Context, to string) Finding {
	name := "RDMA to " + to
	addr, err := peerAddress(to)
	if err == nil {
		var tcp *net.TCPAddr
		if tcp, err = net.ResolveTCPAddr("tcp", addr); err == nil {
			var p rdma.Path
			if p, err = rdma.Find(tcp.AddrPort().Addr()); err == nil {
				return Finding{Name: name, Verdict: VerdictOK, Found: p.String(), Fix: p.Advice}
			}
			if errors.Is(err, rdma.ErrNoDevice) {
				err = fmt.Errorf("%w, and the daemon does so as soft_roce says", err)
			}
		}
	}
	return found(name, "", err, VerdictOptional, "page lanes go over TCP")
}

func checkSoftRoCE() Finding {
	var err error
	what := "rdma_rxe is loaded"
	if !rdma.SoftLoaded() {
		var u unix.Utsname
		_ = unix.Uname(&u)
		deps, derr := os.ReadFile("/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/modules.dep")
		switch {
		case derr != nil:
			err = errors.New("rdma_rxe is not loaded, and this kernel has no modules here")
		case strings.Contains(string(deps), "/rdma_rxe.ko"):
			what = "rdma_rxe can be loaded, with soft_roce: on"
		default:
			err = errors.New("this kernel has no module rdma_rxe")
		}
	}
	return found("soft-RoCE", what, err, VerdictOptional, "apt install linux-image-amd64; TCP is used")
}
