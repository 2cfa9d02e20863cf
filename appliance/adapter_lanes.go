package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
)

// The destination only asks, so what a source's page lane receives is small;
// its pool exists for frames that a strange peer might send.
const (
	laneBuffers    = 2
	laneBufferSize = 4096
)

// lanes is migrate.Lanes over transport/tcp and migrate/stream.
type lanes struct {
	opts   LaneOptions
	log    *slog.Logger
	dialer *tcp.Dialer
	pool   *transport.Pool
	before atomic.Uint64 // bytes sent on lanes that are closed

	mu    sync.Mutex
	now   *epoch
	saved codec.Stats // on lanes that are closed
	// How often RDMA lanes broke, and why the last time.
	broken  int
	brokeOf error
	carry   *carrier           // of now, and of the last epoch where there is none
	offer   []transport.Remote // what the destination may read with the device of carry
}

// epoch is the lanes that were opened together, and who serves them.
type epoch struct {
	lanes  []transport.Lane
	server *stream.Server
	awake  *os.File // keeps the host's processors from sleeping; nil where they may
	cancel context.CancelFunc
	served sync.WaitGroup
	once   sync.Once             // guards what is sent on lost
	lost   chan error            // has room for one
	why    atomic.Pointer[error] // what was sent on lost
}

func (native) NewLanes(opts LaneOptions) (migrate.Lanes, error) {
	l := &lanes{opts: opts, log: logger(opts.Logger)}
	pool, err := transport.NewPool(laneBuffers, laneBufferSize)
	if err != nil {
		return nil, err
	}
	l.pool = pool
	cfg := tcp.Config{Insecure: opts.TLS == nil, PlainPages: opts.TLS == nil, Pool: pool, Log: opts.Logger}
	if opts.TLS != nil {
		_, client, err := keys.LoadTLS(opts.TLS.CA, opts.TLS.Cert, opts.TLS.Key)
		if err != nil {
			return nil, errors.Join(err, pool.Close())
		}
		cfg.Client = client
		if opts.PeerName != "" {
			cfg.Client = keys.Named(client, opts.PeerName)
		}
	}
	if l.dialer, err = tcp.NewDialer(cfg); err != nil {
		return nil, errors.Join(err, pool.Close())
	}
	return l, nil
}

// Open dials the urgent lane and the bulk lanes and serves them with pages of p.
func (l *lanes) Open(ctx context.Context, number uint32, key []byte, p migrate.Process) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
	to, err := net.ResolveTCPAddr("tcp", l.opts.Address)
	if err != nil {
		return fmt.Errorf("page lanes: %w", err)
	}
	c, err := l.carrier(ctx, to)
	if err != nil {
		return fmt.Errorf("page lanes: %w", err)
	}
	l.carryOn(c)
	err = l.open(ctx, to.String(), number, key, p)
	if err != nil && c.device != nil && ctx.Err() == nil && l.opts.Transport != TransportRDMA {
		l.log.Warn("RDMA lanes could not be made, so these go over TCP", "err", err)
		l.carryOn(&carrier{why: err})
		err = l.open(ctx, to.String(), number, key, p)
	}
	if err != nil {
		return err
	}
	if l.opts.OnTransport != nil {
		l.opts.OnTransport(l.carry.told(l.opts.Transport))
	}
	l.offerAll()
	return nil
}

// buffersPerLane: one that is filled while others are fetched by the peer.
const buffersPerLane = 4

// open dials all lanes, over l.carry; caller holds mu. On failure it has closed them.
func (l *lanes) open(ctx context.Context, to string, number uint32, key []byte, p migrate.Process) error {
	bulk := max(1, l.opts.BulkLanes)
	e := &epoch{lost: make(chan error, 1)}
	buffers := bulk + 1 // one buffer for each lane, so that none waits for another
	if l.device() != nil {
		buffers *= buffersPerLane
	}
	var err error
	if e.server, err = stream.NewServer(stream.ServerConfig{
		Compress: l.opts.Compress,
		Reader:   p, Buffers: buffers, Log: l.log, Limiter: l.opts.Limiter, OnUrgent: func() { fault.RaisePriority(l.log) },
	}); err != nil {
		return err
	}
	if !l.opts.IdleSleep {
		if e.awake, err = sys.StayAwake(); err != nil {
			l.log.Debug("waking processors will take its time", "err", err)
		}
	}
	run, cancel := context.WithCancel(context.Background())
	e.cancel = cancel
	l.now = e
	for i := range bulk + 1 {
		id := transport.LaneID{Migration: l.opts.Migration, Epoch: number, Kind: transport.Bulk, Index: uint8(i)}
		if i == bulk {
			id.Kind, id.Index = transport.Urgent, 0
		}
		if err := l.dial(ctx, e, to, id, key); err != nil {
			l.end()
			return fmt.Errorf("page lanes: %w", err)
		}
	}
	for _, lane := range e.lanes {
		e.served.Go(func() {
			if err := e.server.Serve(run, lane); err != nil && run.Err() == nil {
				e.report(fmt.Errorf("%s lane %d: %w", lane.ID().Kind, lane.ID().Index, err))
			}
		})
	}
	return nil
}

// dial adds a lane to e. Where the peer does not take the first on RDMA, all stay
// on TCP.
func (l *lanes) dial(ctx context.Context, e *epoch, to string, id transport.LaneID, key []byte) error {
	id.RDMA = l.device() != nil
	lane, err := l.dialer.DialLane(ctx, to, id, key)
	if err != nil {
		return err
	}
	if id.RDMA {
		var refused error
		if lane, refused, err = l.carry.put(ctx, lane, l.pool); err != nil {
			return err
		}
		if refused != nil {
			if l.opts.Transport == TransportRDMA || len(e.lanes) > 0 {
				return errors.Join(refused, lane.Close())
			}
			l.carryOn(&carrier{why: refused})
		}
	}
	e.lanes = append(e.lanes, lane)
	return nil
}

// report passes on the first failure; the others have the same cause. Who asks
// for it again finds the channel closed: that lane is lost for all of the epoch.
func (e *epoch) report(err error) {
	e.once.Do(func() {
		e.why.Store(&err)
		e.lost <- err
		close(e.lost)
	})
}

// end closes the lanes of the epoch and waits for those who serve them. Caller
// holds mu.
func (l *lanes) end() {
	e := l.now
	if e == nil {
		return
	}
	l.now = nil
	e.cancel()
	for _, lane := range e.lanes {
		lane.Close()
	}
	e.served.Wait()
	for _, lane := range e.lanes {
		l.before.Add(lane.Stats().BytesSent)
	}
	if why := e.why.Load(); why != nil && l.device() != nil {
		l.broken++
		l.brokeOf = *why
	}
	if e.awake != nil {
		_ = e.awake.Close()
	}
	l.saved.Add(e.server.Saved())
	if err := e.server.Close(); err != nil {
		l.log.Error("page server", "err", err)
	}
}

func (l *lanes) Lost() <-chan error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now == nil {
		return nil
	}
	return l.now.lost
}

func (l *lanes) Round(number uint32, again bool, send, gone *page.Set) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now == nil {
		return
	}
	if number == 0 {
		l.now.server.EndRounds()
	} else {
		l.now.server.Round(number, again, send, gone)
	}
}

// Saved counts those of closed lanes, too.
func (l *lanes) Saved() migrate.Saved {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.saved
	if l.now != nil {
		st.Add(l.now.server.Saved())
	}
	return migrate.Saved{
		Raw: migrate.Count(st.Raw), Zero: migrate.Count(st.Zero), LZ4: migrate.Count(st.LZ4),
		Delta: migrate.Count(st.Delta), Same: migrate.Count(st.Same),
	}
}

func (l *lanes) BytesSent() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.before.Load()
	if l.now != nil {
		for _, lane := range l.now.lanes {
			n += lane.Stats().BytesSent
		}
	}
	return n
}

func (l *lanes) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
	l.carryOn(nil)
	if l.pool == nil {
		return nil
	}
	err := l.pool.Close()
	l.pool = nil
	return err
}
