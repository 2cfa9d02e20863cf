package appliance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
)

// What the page lanes of a migration can go over.
const (
	TransportAuto = "auto"
	TransportRDMA = "rdma"
	TransportTCP  = "tcp"
)

// upgradeLimit is how long both ends may take to put a lane on RDMA.
const upgradeLimit = 10 * time.Second

// mostBroken is how often RDMA lanes may break before a migration that may choose
// goes on over TCP.
const mostBroken = 2

// errPlainOnly is why RDMA is not chosen where pages go under TLS.
var errPlainOnly = errors.New("RDMA encrypts nothing, and page_lanes is tls (plain, on both hosts, allows it)")

// carrier is what the lanes of an epoch go over.
type carrier struct {
	device  *rdma.Device // nil: TCP
	release func()
	why     error // TCP: why not RDMA; nil where nobody asked for that
}

func (c *carrier) close() error {
	if c == nil || c.device == nil {
		return nil
	}
	err := c.device.Close()
	c.release()
	return err
}

// carrier chooses, and opens the device. addr is HOST:PORT of the destination.
func (l *lanes) carrier(ctx context.Context, addr *net.TCPAddr) (*carrier, error) {
	c, err := &carrier{release: func() {}}, error(nil)
	switch {
	case l.opts.Transport == TransportTCP || l.opts.Fabric == nil:
		return c, nil
	case l.opts.TLS != nil:
		err = errPlainOnly
	case l.opts.Transport != TransportRDMA && l.broken >= mostBroken:
		err = fmt.Errorf("RDMA lanes broke %d times, the last time: %w", l.broken, l.brokeOf)
	default:
		var p rdma.Path
		if p, c.release, err = l.opts.Fabric.Path(ctx, addr.AddrPort().Addr()); err != nil {
			break
		}
		if d := l.device(); d != nil && d.Path() == p && d.Err() == nil {
			c.release()
			return l.carry, nil // with what is registered
		}
		if c.device, err = rdma.Open(p); err != nil {
			c.release()
		}
	}
	if err != nil && l.opts.Transport == TransportRDMA {
		return nil, fmt.Errorf("transport rdma: %w", err)
	}
	c.why = err
	return c, nil
}

// device is what the lanes are on now, or nil; caller holds mu.
func (l *lanes) device() *rdma.Device {
	if l.carry == nil {
		return nil
	}
	return l.carry.device
}

// carryOn puts c in the place of what the lanes were on before, of which no lane is
// left; caller holds mu.
func (l *lanes) carryOn(c *carrier) {
	if old := l.carry; old != c {
		l.carry, l.offer = c, nil
		if err := old.close(); err != nil {
			l.log.Warn("RDMA device", "err", err)
		}
	}
}

// put puts a lane that was just dialled on RDMA. Where the peer refuses it returns
// the lane as it is, and why.
func (c *carrier) put(ctx context.Context, over transport.Lane, pool *transport.Pool) (lane transport.Lane, refused, err error) {
	ctx, stop := context.WithTimeout(ctx, upgradeLimit)
	defer stop()
	l, err := rdma.Connect(ctx, over, rdma.Config{Device: c.device, Pool: pool})
	switch {
	case err == nil:
		return l, nil, nil
	case errors.Is(err, rdma.ErrRefused) && ctx.Err() == nil:
		return over, err, nil
	}
	return nil, nil, err
}

// told is the name of what the lanes go over, and what a report says of it.
func (c *carrier) told(asked string) (name, remark string) {
	switch {
	case c.device != nil:
		p := c.device.Path()
		remark = p.String()
		if p.Advice != "" {
			remark += "; " + p.Advice
		}
		return TransportRDMA, remark
	case asked == TransportTCP:
		return TransportTCP, ""
	}
	return TransportTCP, fmt.Sprintf("tcp, as %v", c.why)
}
