package rdma

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/rdma/verbs"
	"github.com/pageferry/pageferry/transport"
)

// ErrNoLibrary: libibverbs is not installed, or the binary was built without cgo.
var ErrNoLibrary = verbs.ErrNoLibrary

// Available is nil, or wraps ErrNoLibrary.
func Available() error { return verbs.Available() }

// ErrDevice: the RDMA device or its port failed. Lanes on it end with an error
// that wraps it and transport.ErrPeer.
var ErrDevice = errors.New("rdma: device failed")

// Device is an open RDMA device. What is registered with it may be read by the
// peers of all lanes on it that know its key, and by nobody else: open one for
// each migration. Safe for concurrent use.
type Device struct {
	path   Path
	v      *verbs.Device
	limits verbs.Limits
	// Closed when the goroutines have ended.
	events, present chan struct{}

	mu     sync.Mutex
	pools  map[*transport.Pool]*pooled
	lanes  map[*Lane]struct{}
	closed bool
	failed error

	// See lend.go.
	lendMu  sync.Mutex
	adopted map[*Region]uint32 // the kernel's handles; nil when closed
	driver  uint32             // 0: not asked for
	lent    bool
}

// pooled is a pool that lanes use.
type pooled struct {
	region *verbs.Region
	users  int
}

// Open opens the device of a path that Find returned.
func Open(p Path) (*Device, error) {
	v, err := verbs.Open(p.Device)
	if err != nil {
		// The library says ENOENT where it was not let in.
		if node := uverbsOf(p.Device); node != "" && !errors.Is(err, ErrNoLibrary) {
			if aerr := unix.Access(node, unix.R_OK|unix.W_OK); aerr != nil {
				return nil, fmt.Errorf("rdma: open %s, the node of %s: %w", node, p.Device, aerr)
			}
		}
		return nil, err
	}
	d := &Device{path: p, v: v, events: make(chan struct{}), present: make(chan struct{}), pools: map[*transport.Pool]*pooled{}, lanes: map[*Lane]struct{}{},
		adopted: map[*Region]uint32{}}
	d.limits, err = v.Query(p.Port, p.GIDIndex)
	switch {
	case err != nil:
	case d.limits.PortState != verbs.PortActive:
		err = fmt.Errorf("%w: port %d of %s", ErrPortDown, p.Port, p.Device)
	case netip.AddrFrom16(d.limits.GID).Unmap() != p.Local:
		err = fmt.Errorf("%w %d of %s is %s by now, not %s", ErrNoGID, p.GIDIndex, p.Device, netip.AddrFrom16(d.limits.GID).Unmap(), p.Local)
	}
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	go d.watch()
	go d.presence()
	return d, nil
}

// presence notices that the device is being removed. Drivers that cannot take it
// from under a program, rxe among them, tell nobody and wait until the program has
// closed it; but the node that programs open is gone by then.
func (d *Device) presence() {
	defer close(d.present)
	tick := time.NewTicker(presenceInterval)
	defer tick.Stop()
	node := uverbsOf(d.path.Device)
	for {
		select {
		case <-d.events:
			return
		case <-tick.C:
		}
		if now := uverbsOf(d.path.Device); now == "" || now != node {
			d.failLanes(0, fmt.Errorf("%w: %w: %s is being removed", transport.ErrPeer, ErrDevice, d.path.Device))
			return
		}
	}
}

const presenceInterval = 500 * time.Millisecond

// Err is why no new lane can be made with the device, or nil.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

// Path is how the device was found.
func (d *Device) Path() Path { return d.path }

// MTU is the payload of a packet in bytes that the port is set to.
func (d *Device) MTU() int { return int(d.limits.MTU) }

// ReadDepth is how many READs a lane has under way at a time, if the peer's device
// answers as many.
func (d *Device) ReadDepth() int { return int(d.limits.ReadInitiate) }

// Close ends the lanes that are still there and closes the device, and the regions
// that were adopted. Other regions must be closed, and calls of Connect must have
// returned.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	var lanes []*Lane
	for l := range d.lanes {
		lanes = append(lanes, l)
	}
	d.mu.Unlock()
	for _, l := range lanes {
		_ = l.Close() // says nothing
	}
	d.v.StopEvents()
	<-d.events
	<-d.present
	err := d.giveUpAll()
	return errors.Join(err, d.closeDevice())
}

// watch turns what happens to the device into errors of its lanes.
func (d *Device) watch() {
	defer close(d.events)
	for {
		e, qp, err := d.v.Event()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err == nil && qp == 0 && e != verbs.EventDeviceFatal && e != verbs.EventPortDown {
			continue
		}
		if err == nil && e == verbs.EventPortDown {
			// The event is of any of the device's ports.
			if l, qerr := d.v.Query(d.path.Port, d.path.GIDIndex); qerr == nil && l.PortState == verbs.PortActive {
				continue
			}
		}
		if err != nil {
			d.failLanes(0, fmt.Errorf("%w: %w: %s: %w", transport.ErrPeer, ErrDevice, d.path.Device, err))
			return // the descriptor is of no more use
		}
		d.failLanes(qp, fmt.Errorf("%w: %w: %s: %s", transport.ErrPeer, ErrDevice, d.path.Device, e))
	}
}

// failLanes ends the lane of a queue pair, or all.
func (d *Device) failLanes(qp uintptr, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if qp == 0 && d.failed == nil {
		d.failed = err
	}
	for l := range d.lanes {
		if qp == 0 || l.qp.Handle() == qp || l.readQP.Handle() == qp {
			l.mu.Lock()
			l.fail(err)
			l.mu.Unlock()
		}
	}
}

func (d *Device) enter(l *Lane) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("%s: %w", d.path.Device, os.ErrClosed)
	}
	d.lanes[l] = struct{}{}
	return nil
}

func (d *Device) leave(l *Lane) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.lanes, l)
}

// use registers p, once for all lanes that use it; drop is for each that did.
// Registering takes a while for a large pool.
func (d *Device) use(p *transport.Pool) (*verbs.Region, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.pools[p]
	if r == nil {
		_ = unix.Madvise(p.Memory(), unix.MADV_HUGEPAGE) // fewer entries in the device's tables, where the kernel likes to
		region, err := d.v.Register(p.Memory(), verbs.LocalWrite|verbs.RemoteRead)
		if err != nil {
			return nil, err
		}
		r = &pooled{region: region}
		d.pools[p] = r
	}
	r.users++
	return r.region, nil
}

func (d *Device) drop(p *transport.Pool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.pools[p]
	if r.users--; r.users > 0 {
		return nil
	}
	delete(d.pools, p)
	return r.region.Close()
}

// Region is memory that the peers of the device's lanes may read with ReadRemote.
type Region struct {
	key   uint32
	addr  uint64
	close func() error
}

// Register pins mem and lets peers that are told its key and address read it. mem
// must be mapped, not of the Go heap, and stay mapped until Close.
func (d *Device) Register(mem []byte) (*Region, error) {
	r, err := d.v.Register(mem, verbs.LocalWrite|verbs.RemoteRead)
	if err != nil {
		return nil, err
	}
	return &Region{r.RKey, uint64(sys.Address(mem)), r.Close}, nil
}

// Key and Address are what the peer needs for ReadRemote.
func (r *Region) Key() uint32 { return r.key }

// Address is where the region begins.
func (r *Region) Address() uint64 { return r.addr }

// Close unpins the memory. A READ of it after that fails, and with it the lane.
func (r *Region) Close() error { return r.close() }
