package rdma

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
	"github.com/pageferry/pageferry/wire"
)

var bulkID = transport.LaneID{Migration: transport.MigrationID{7}, Epoch: 1, Kind: transport.Bulk}

func newPool(t testing.TB, n, size int) *transport.Pool {
	t.Helper()
	p, err := transport.NewPool(n, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// pair is two lanes over the wire; both ends and their devices are closed at the end.
func pair(t testing.TB, id transport.LaneID) (x, y *Lane, pool *transport.Pool) {
	t.Helper()
	noResources(t)
	pool = newPool(t, 64, 64<<10)
	a, b := Config{Device: open(t, farAddr), Pool: pool}, Config{Device: open(t, nearAddr), Pool: newPool(t, 64, 64<<10)}
	x, y = connected(t, id, a, b)
	t.Cleanup(func() { x.Close(); y.Close() })
	return x, y, pool
}

// region maps and registers random memory.
func region(t testing.TB, d *Device, n int) ([]byte, *Region) {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	g := rand.NewChaCha8([32]byte{1})
	_, _ = g.Read(mem)
	r, err := d.Register(mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), unix.Munmap(mem)); err != nil {
			t.Error(err)
		}
	})
	return mem, r
}

func testReadRemote(t *testing.T) {
	testutil.Require(t, twoDevices)
	x, y, pool := pair(t, bulkID)
	mem, r := region(t, y.dev, 1<<20)
	var wg sync.WaitGroup
	for i := range 24 { // more than there are places
		wg.Go(func() {
			g := rand.New(rand.NewPCG(1, uint64(i)))
			for range 20 {
				n := 1 + g.IntN(pool.BufferSize())
				off := g.IntN(len(mem) - n)
				b := pool.Get(n, nil)
				err := x.ReadRemote(t.Context(), r.Key(), r.Address()+uint64(off), b)
				if err != nil || !bytes.Equal(b.Bytes(), mem[off:off+n]) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
				}
				b.Release()
			}
		})
	}
	wg.Wait()
}

// testForeignMemory: what the peer did not register cannot be read, the
// lane ends with an error that says so, and the peer is none the worse.
func testForeignMemory(t *testing.T) {
	testutil.Require(t, twoDevices)
	for name, f := range map[string]func(r *Region) (key uint32, addr uint64){
		"wrong key":     func(r *Region) (uint32, uint64) { return r.Key() ^ 0x55, r.Address() },
		"past the end":  func(r *Region) (uint32, uint64) { return r.Key(), r.Address() + 64<<10 - 100 },
		"before it":     func(r *Region) (uint32, uint64) { return r.Key(), r.Address() - 1 },
		"no such place": func(r *Region) (uint32, uint64) { return r.Key(), 0xdead000 },
	} {
		t.Run(name, func(t *testing.T) {
			x, y, pool := pair(t, bulkID)
			_, r := region(t, y.dev, 64<<10)
			b := pool.Get(4096, nil)
			defer b.Release()
			key, addr := f(r)
			err := x.ReadRemote(t.Context(), key, addr, b)
			if !errors.Is(err, ErrRemoteMemory) || !errors.Is(err, transport.ErrPeer) {
				t.Errorf("read: %v", err)
			}
			for side, l := range map[string]*Lane{"reader": x, "peer": y} {
				if _, err := l.Recv(); !errors.Is(err, transport.ErrPeer) {
					t.Errorf("the %s receives: %v", side, err)
				}
			}
		})
	}
}

// testRefused: an end that cannot, and an end that is of another lane or
// version, are told apart; where RDMA is only not possible the companion goes on.
func testRefused(t *testing.T) {
	testutil.Require(t, twoDevices)
	noResources(t)
	dev, pool := open(t, farAddr), newPool(t, 2, 4096)
	for name, c := range map[string]struct {
		edit func(o *offer) string
		want error
		open bool
	}{
		"cannot":        {func(o *offer) string { o.Refused = 1; return "no memory" }, ErrRefused, true},
		"version":       {func(o *offer) string { o.Version++; return "" }, ErrRefused, true},
		"old epoch":     {func(o *offer) string { o.Epoch--; return "" }, transport.ErrAuth, false},
		"other lane":    {func(o *offer) string { o.Index++; return "" }, transport.ErrAuth, false},
		"no credits":    {func(o *offer) string { o.Credits = 0; return "" }, transport.ErrDamaged, false},
		"no offer":      {func(o *offer) string { o.Magic[0]++; return "" }, transport.ErrDamaged, false},
		"huge chunks":   {func(o *offer) string { o.SlotSize = 1 << 30; return "" }, transport.ErrDamaged, false},
		"no such place": {func(o *offer) string { o.GID = [16]byte{}; return "" }, ErrRefused, true},
	} {
		t.Run(name, func(t *testing.T) {
			over, peer := newPipe(t, bulkID)
			defer over.Close()
			defer peer.Close()
			o := offer{Magic: offerMagic, Version: offerVersion, Kind: uint8(bulkID.Kind), Migration: bulkID.Migration, Epoch: bulkID.Epoch,
				GID: dev.limits.GID, QPN: 77, MTU: 1024, ReadDepth: 4, SlotSize: slotSize, Credits: 8, Refs: 8}
			reason := c.edit(&o)
			b := o.encode(reason)
			if err := peer.Send(transport.Frame{Type: wire.TypeMessage, Meta: b}); err != nil {
				t.Fatal(err)
			}
			if name == "no such place" { // found out when it connects
				go peer.Send(transport.Frame{Type: wire.TypeMessage, Meta: b})
			}
			l, err := Connect(t.Context(), over, Config{Device: dev, Pool: pool})
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if l != nil {
				l.Close()
			}
			if err := over.Send(transport.Frame{Type: wire.TypePing}); (err == nil) != c.open {
				t.Errorf("the companion is open: %v, want %v (%v)", err == nil, c.open, err)
			}
		})
	}
}

// conn is a framed.Stream over a unix socket, as a lane between two processes.
type conn struct {
	*net.UnixConn
	n atomic.Uint64
}

func lost(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("%w: %w", transport.ErrPeer, err)
}

func (c *conn) Read(p []byte) (int, error) { n, err := c.UnixConn.Read(p); return n, lost(err) }
func (c *conn) ReadFull(p []byte) error    { _, err := io.ReadFull(c.UnixConn, p); return lost(err) }
func (c *conn) Write(bufs [][]byte) error {
	b := net.Buffers(bufs)
	_, err := b.WriteTo(c.UnixConn)
	return lost(err)
}
func (c *conn) Counters() (uint64, uint64) { return 0, 0 }

func newConn(t testing.TB, f *os.File, id transport.LaneID) transport.Lane {
	t.Helper()
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return framed.New(id, &conn{UnixConn: c.(*net.UnixConn)}, nil)
}

func socketpair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
}

func newPipe(t testing.TB, id transport.LaneID) (a, b transport.Lane) {
	t.Helper()
	x, y := socketpair(t)
	return newConn(t, x, id), newConn(t, y, id)
}

const childEnv = "PAGEFERRY_RDMA_CHILD"

// TestGuestChild is the peer of testKilled: it sends and receives until it
// is killed.
func TestGuestChild(t *testing.T) {
	if os.Getenv(childEnv) == "" {
		return
	}
	dev, pool := open(t, nearAddr), newPool(t, 16, 64<<10)
	l, err := Connect(t.Context(), newConn(t, os.NewFile(3, "companion"), bulkID), Config{Device: dev, Pool: pool})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for l.Send(transport.Frame{Type: wire.TypePages, Payload: pool.Get(64<<10, nil)}) == nil {
		}
	}()
	for {
		f, err := l.Recv()
		if err != nil {
			return
		}
		f.Payload.Release()
	}
}

// testKilled: a peer that is killed in the middle of everything is noticed,
// soon, and leaves nothing behind at either end.
func testKilled(t *testing.T) {
	testutil.Require(t, twoDevices)
	noResources(t)
	near, far := socketpair(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestGuestChild$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.ExtraFiles = []*os.File{far}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	far.Close()
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the peer said: %s", &out)
		}
	}()
	pool := newPool(t, 16, 64<<10)
	l, err := Connect(t.Context(), newConn(t, near, bulkID), Config{Device: open(t, farAddr), Pool: pool})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sent := make(chan error, 1)
	go func() {
		for {
			b := pool.Get(64<<10, l.done)
			if err := l.Send(transport.Frame{Type: wire.TypePages, Payload: b}); err != nil {
				sent <- err
				return
			}
		}
	}()
	var killed time.Time
	for i := 0; ; i++ {
		if i == 50 {
			killed = time.Now()
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		f, err := l.Recv()
		f.Payload.Release()
		if err != nil {
			if !errors.Is(err, transport.ErrPeer) || killed.IsZero() {
				t.Errorf("frame %d: %v", i, err)
			}
			break
		}
	}
	if err := <-sent; !errors.Is(err, transport.ErrPeer) {
		t.Errorf("send: %v", err)
	}
	t.Logf("noticed after %v", time.Since(killed))
}

// softLoop is two lanes from a soft-RoCE device of its own to itself.
func softLoop(t *testing.T) (x, y *Lane, link netlink.Link, s *Soft, closeAll func()) {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "soft1", MTU: 1500}}); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("soft1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(link) })
	addr, _ := netlink.ParseAddr("10.8.0.1/24")
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil {
		t.Fatal(err)
	}
	if s, err = MakeSoft(t.Context(), "soft1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	p, err := Find(netip.MustParseAddr("10.8.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	pool := newPool(t, 16, 64<<10)
	var devs [2]*Device
	for i := range devs {
		if devs[i], err = Open(p); err != nil {
			t.Fatal(err)
		}
	}
	x, y = connected(t, bulkID, Config{Device: devs[0], Pool: pool}, Config{Device: devs[1], Pool: pool})
	var once sync.Once
	closeAll = func() {
		once.Do(func() {
			for _, d := range devs {
				if err := d.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}
		})
	}
	t.Cleanup(closeAll)
	return x, y, link, s, closeAll
}

// testDeviceGone: the port goes down, or somebody removes the device.
func testDeviceGone(t *testing.T) {
	testutil.Require(t, twoDevices)
	for name, f := range map[string]func(netlink.Link, *Soft) error{
		"link down":      func(l netlink.Link, _ *Soft) error { return netlink.LinkSetDown(l) },
		"device removed": func(_ netlink.Link, s *Soft) error { return netlink.RdmaLinkDel(s.Name()) },
		"netdev removed": func(l netlink.Link, _ *Soft) error { return netlink.LinkDel(l) },
	} {
		t.Run(name, func(t *testing.T) {
			x, y, link, s, closeAll := softLoop(t)
			errs := make(chan error, 2)
			for _, l := range []*Lane{x, y} {
				go func() {
					_, err := l.Recv()
					errs <- err
				}()
			}
			gone := make(chan error, 1)
			go func() { gone <- f(link, s) }()
			for range 2 {
				select {
				case err := <-errs:
					if !errors.Is(err, transport.ErrPeer) {
						t.Errorf("receive: %v", err)
					}
					t.Log(err)
				case <-time.After(10 * time.Second):
					t.Error("nobody noticed")
				}
			}
			closeAll()
			select {
			case err := <-gone:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(10 * time.Second):
				t.Error("it is still not gone")
			}
		})
	}
}
