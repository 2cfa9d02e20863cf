package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
)

// Control lanes carry the image in pieces of at most a MiB; each connection
// holds one while it reads it.
const (
	controlBuffers    = 4
	controlBufferSize = 1 << 20
)

// network is the daemon's side of transport/tcp: one listener, and control
// lanes to other daemons.
type network struct {
	listen string
	cfg    tcp.Config
	dialer *tcp.Dialer
	log    *slog.Logger
}

// incoming is what a peer's connection turns into. Neither may be nil; control
// runs on a goroutine of its own and owns the lane, lane owns conn.
type incoming struct {
	control func(lane transport.Lane, peer transport.Peer)
	lane    func(id transport.LaneID, conn *os.File)
}

func newNetwork(c Config, log *slog.Logger) (*network, error) {
	n := &network{listen: c.Listen, log: log, cfg: tcp.Config{
		Insecure: c.Insecure, PlainPages: c.PageLanes == "plain", Log: log,
	}}
	if !c.Insecure {
		server, client, err := keys.LoadTLS(c.TLS.CA, c.TLS.Cert, c.TLS.Key)
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		n.cfg.Server, n.cfg.Client = server, client
	}
	var err error
	if n.cfg.Pool, err = transport.NewPool(controlBuffers, controlBufferSize); err != nil {
		return nil, err
	}
	if n.dialer, err = tcp.NewDialer(n.cfg); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

// close gives the buffers back; nothing of the network may be in use.
func (n *network) close() error { return n.cfg.Pool.Close() }

func (n *network) dial(ctx context.Context, to string) (transport.Lane, transport.Peer, error) {
	return n.dialer.DialControl(ctx, to)
}

// serve accepts until ctx ends. It returns after every control function has.
func (n *network) serve(ctx context.Context, ready func(), in incoming) error {
	l, err := tcp.Listen(n.listen, n.cfg)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer l.Close()
	ready()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("listen: %w", err)
		}
		if c.Control != nil {
			wg.Go(func() { in.control(c.Control, c.Peer) })
		} else {
			wg.Go(func() { in.lane(c.ID, c.Conn) })
		}
	}
}
