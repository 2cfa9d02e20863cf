package pager

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
)

// fabric is the RDMA device of the lanes of an epoch.
type fabric struct {
	mu     sync.Mutex
	device *rdma.Device
	closed bool
}

// put puts a lane that was just accepted on RDMA, or says that it cannot be. On
// error the lane is closed.
func (f *fabric) put(ctx context.Context, over transport.Lane, m laneMsg, pool *transport.Pool, log *slog.Logger) (transport.Lane, error) {
	d, err := f.open(m)
	if err != nil {
		log.Info("page lanes go over TCP", "why", err)
		return over, rdma.Refuse(ctx, over, err)
	}
	l, err := rdma.Connect(ctx, over, rdma.Config{Device: d, Pool: pool})
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, rdma.ErrRefused) && ctx.Err() == nil:
		log.Info("page lanes go over TCP", "why", err)
		return over, nil
	}
	return nil, err
}

func (f *fabric) open(m laneMsg) (*rdma.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case m.NoPath != "":
		return nil, errors.New(m.NoPath)
	case m.Path == nil:
		return nil, errors.New("the daemon there has no RDMA")
	case f.closed:
		return nil, transport.ErrClosed
	case f.device != nil && f.device.Path() == *m.Path:
		return f.device, nil
	case f.device != nil:
		if err := f.device.Close(); err != nil {
			return nil, err
		}
		f.device = nil
	}
	d, err := rdma.Open(*m.Path)
	if err == nil {
		f.device = d
	}
	return d, err
}

// drop closes the device, of which no lane is left. Lanes after it open it anew.
func (f *fabric) drop() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.device
	f.device = nil
	if d == nil {
		return nil
	}
	return d.Close()
}

// close is drop, and no lane may come after.
func (f *fabric) close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	return f.drop()
}
