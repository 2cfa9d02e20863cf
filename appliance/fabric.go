package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"github.com/pageferry/pageferry/rdma"
)

// What Config.SoftRoCE can be.
const (
	SoftOff  = "off"
	SoftAuto = "auto"
	SoftOn   = "on"
)

// Fabric finds the RDMA devices that lead to peers. Where the network device of a
// route has none it makes one of soft-RoCE, if it may, and removes it when nobody
// needs it any more. Safe for concurrent use.
type Fabric struct {
	soft string // of Config
	log  *slog.Logger

	mu   sync.Mutex // also held while a device is made or removed
	made map[string]*softDevice
}

// softDevice is one that was made, and how many need it.
type softDevice struct {
	dev   *rdma.Soft
	users int
}

// NewFabric takes a SoftRoCE of Config.
func NewFabric(soft string, log *slog.Logger) *Fabric {
	return &Fabric{soft: soft, log: log, made: map[string]*softDevice{}}
}

// Sweep removes soft-RoCE devices that an earlier daemon made and nobody uses.
func (f *Fabric) Sweep() {
	gone, err := rdma.RemoveUnused()
	for _, name := range gone {
		f.log.Info("removed a soft-RoCE device that an earlier daemon left", "device", name)
	}
	if err != nil {
		f.log.Warn("soft-RoCE devices of an earlier daemon", "err", err)
	}
}

// Path returns the device that leads to peer. The caller calls release, which is
// never nil, when it needs the device no more. The error says why there is none.
func (f *Fabric) Path(ctx context.Context, peer netip.Addr) (p rdma.Path, release func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err = rdma.Find(peer)
	if lerr := rdma.Available(); lerr != nil && (err == nil || errors.Is(err, rdma.ErrNoDevice)) {
		return p, func() {}, lerr
	}
	if errors.Is(err, rdma.ErrNoDevice) && p.Netdev != "" {
		p, err = f.make(ctx, peer, p.Netdev, err)
	}
	if err != nil {
		f.drop(p.Netdev, 0)
		return p, func() {}, err
	}
	if s := f.made[p.Netdev]; s != nil && s.dev.Name() == p.Device {
		s.users++
		return p, sync.OnceFunc(func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.drop(p.Netdev, 1)
		}), nil
	}
	return p, func() {}, nil
}

// possible is nil, or why there can be no RDMA lanes to a daemon. It makes no device,
// and nobody is asked.
func (f *Fabric) possible(to string, plain bool) error {
	if !plain {
		return errPlainOnly
	}
	if err := rdma.Available(); err != nil {
		return err
	}
	addr, err := net.ResolveTCPAddr("tcp", to)
	if err != nil {
		return nil // who dials will say so, and better
	}
	_, err = rdma.Find(addr.AddrPort().Addr())
	if errors.Is(err, rdma.ErrNoDevice) && (f.soft == SoftOn || f.soft == SoftAuto && rdma.SoftLoaded()) {
		return nil
	}
	return err
}

// make makes a soft-RoCE device; caller holds mu. why is why there is no other.
func (f *Fabric) make(ctx context.Context, peer netip.Addr, netdev string, why error) (rdma.Path, error) {
	p := rdma.Path{Netdev: netdev}
	switch {
	case f.soft == SoftOff:
		return p, fmt.Errorf("%w, which soft_roce: auto or on lets the daemon do", why)
	case f.soft == SoftAuto && !rdma.SoftLoaded():
		return p, fmt.Errorf("%w, and the kernel's module rdma_rxe is not loaded, which soft_roce: on does", why)
	}
	s, err := rdma.MakeSoft(ctx, netdev)
	if err != nil {
		return p, err
	}
	f.log.Info("made a soft-RoCE device", "device", s.Name(), "netdev", netdev)
	f.made[netdev] = &softDevice{dev: s}
	return rdma.Find(peer)
}

// drop counts users off and removes the device after the last; caller holds mu.
func (f *Fabric) drop(netdev string, users int) {
	s := f.made[netdev]
	if s == nil {
		return
	}
	if s.users -= users; s.users > 0 {
		return
	}
	delete(f.made, netdev)
	if err := s.dev.Close(); err != nil {
		f.log.Warn("soft-RoCE device", "err", err)
	}
}
