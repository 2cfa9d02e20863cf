package appliance

import (
	"context"
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/rdma"
)

// path is the RDMA device for a page lane that came by conn, or why there is none.
// A device that was made for it stays until leavePath.
func (a *arrival) path(ctx context.Context, conn *os.File) (*rdma.Path, error) {
	f := a.host.opts.Fabric
	if a.host.opts.TLS != nil && !a.record.PlainPages || f == nil {
		return nil, errPlainOnly
	}
	peer, err := remote(conn)
	if err != nil {
		return nil, err
	}
	p, release, err := f.Path(ctx, peer)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	before, done := a.release, a.done
	a.release = release
	a.mu.Unlock()
	if before != nil {
		before()
	}
	if done {
		a.leavePath()
	}
	return &p, nil
}

// leavePath: the pager has ended, or will not be asked for lanes again.
func (a *arrival) leavePath() {
	a.mu.Lock()
	release := a.release
	a.release = nil
	a.mu.Unlock()
	if release != nil {
		release()
	}
}

// remote is the host at the other end of conn, a TCP connection.
func remote(conn *os.File) (netip.Addr, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.Addr{}, err
	}
	var sa unix.Sockaddr
	if cerr := raw.Control(func(fd uintptr) { sa, err = unix.Getpeername(int(fd)) }); cerr != nil || err != nil {
		return netip.Addr{}, errors.Join(cerr, err)
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(a.Addr), nil
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(a.Addr).Unmap(), nil
	}
	return netip.Addr{}, errors.New("a page lane that is not TCP")
}
