package verbs

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Device is an open RDMA device with one protection domain.
type Device struct {
	b       binding
	name    string
	ctx, pd uintptr
	async   *waiter
}

// Open opens the device of that name. It wraps ErrNoLibrary, syscall.ENODEV
// where there is no such device, or what the library says where it is not let to it.
func Open(name string) (*Device, error) {
	b, err := library()
	if err != nil {
		return nil, err
	}
	ctx, pd, fd, errno := b.open(name)
	if errno != 0 {
		return nil, failed("open "+name, errno)
	}
	d := &Device{b: b, name: name, ctx: ctx, pd: pd}
	if d.async, err = newWaiter(fd, name+" events"); err != nil {
		b.close(ctx, pd)
		return nil, err
	}
	return d, nil
}

// Close closes the device, on which nothing may be left: syscall.EBUSY says that
// something was, and that the kernel has ended it. It ends Event.
func (d *Device) Close() error {
	d.async.close()
	return failed("close "+d.name, d.b.close(d.ctx, d.pd))
}

// Query returns what the device and its port can do, and their state now.
func (d *Device) Query(port, gidIndex int) (l Limits, err error) {
	err = failed(fmt.Sprintf("query %s port %d gid %d", d.name, port, gidIndex), d.b.query(d.ctx, port, gidIndex, &l))
	return l, err
}

// Event waits for something to happen to the device. qp is the handle of the
// queue pair that it happened to, or 0. It ends with os.ErrClosed on StopEvents.
func (d *Device) Event() (e Event, qp uintptr, err error) {
	var errno syscall.Errno
	err = d.async.wait(func() bool {
		e, qp, errno = d.b.async(d.ctx)
		return errno != syscall.EAGAIN
	})
	if err == nil {
		err = failed("events of "+d.name, errno)
	}
	return e, qp, err
}

// StopEvents makes Event return. Close needs it to have returned.
func (d *Device) StopEvents() { d.async.close() }

// Kernel returns the descriptor on which the kernel takes commands for the device,
// which stays the library's, and the number of the protection domain on it.
func (d *Device) Kernel() (fd int, pd uint32) { return d.b.kernel(d.ctx, d.pd) }

// Region is memory that the device may read and write.
type Region struct {
	b          binding
	mr         uintptr
	LKey, RKey uint32
}

// Register pins mem, which must not be of the Go heap and must stay mapped until
// Close, and lets the device access it.
func (d *Device) Register(mem []byte, access uint32) (*Region, error) {
	mr, lkey, rkey, errno := d.b.reg(d.pd, mem, access)
	if errno == syscall.ENOMEM {
		return nil, fmt.Errorf("verbs: register %d bytes with %s: %w (is the limit of locked memory, ulimit -l, high enough?)", len(mem), d.name, errno)
	}
	if errno != 0 {
		return nil, failed(fmt.Sprintf("register %d bytes with %s", len(mem), d.name), errno)
	}
	return &Region{d.b, mr, lkey, rkey}, nil
}

// Close unpins the memory.
func (r *Region) Close() error { return failed("deregister", r.b.dereg(r.mr)) }

// waiter sleeps on a descriptor of the library in the runtime's poller.
type waiter struct {
	f   *os.File
	raw syscall.RawConn
}

// newWaiter waits on a copy of fd, which must be non-blocking and stays the library's.
func newWaiter(fd int, name string) (*waiter, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("verbs: %s: %w", name, os.NewSyscallError("fcntl", err))
	}
	f := os.NewFile(uintptr(dup), name)
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &waiter{f, raw}, nil
}

// wait calls ready until it returns true, sleeping in between until the
// descriptor becomes readable. It ends with os.ErrClosed on close.
func (w *waiter) wait(ready func() bool) error {
	return w.raw.Read(func(uintptr) bool { return ready() })
}

func (w *waiter) close() { _ = w.f.Close() }
