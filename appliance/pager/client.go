package pager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// Client is the daemon's handle on a pager.
type Client struct {
	cfg    Config
	conn   *conn
	events chan Event
	done   chan struct{} // closed when no more replies will come
	closed chan struct{} // closed by Close
	queued chan struct{} // has room for one: queue is not empty
	once   sync.Once
	wg     sync.WaitGroup

	mu       sync.Mutex
	who      who
	pidfd    int // of the pager
	reap     func()
	next     uint64
	calls    map[uint64]chan packet
	finished bool
	queue    []Event
}

// newClient takes ownership of c and pidfd. reap, which may be nil, waits for a
// child that has ended.
func newClient(cfg Config, c *conn, w who, pidfd int, reap func()) *Client {
	cl := &Client{
		cfg: cfg, conn: c, who: w, pidfd: pidfd, reap: reap,
		events: make(chan Event), queued: make(chan struct{}, 1), done: make(chan struct{}), closed: make(chan struct{}),
		calls: map[uint64]chan packet{},
	}
	cl.wg.Add(3)
	go cl.deliver()
	go cl.receive()
	go cl.watch()
	return cl
}

// PID is the pager's process.
func (c *Client) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.who.PID
}

// KeeperPID is the keeper's. It changes when a keeper died and was replaced.
func (c *Client) KeeperPID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.who.Keeper
}

// Events is closed when the pager is gone or the client is closed. Whoever is
// slow misses Progress events but no others.
func (c *Client) Events() <-chan Event { return c.events }

// receive deals out replies and events.
func (c *Client) receive() {
	defer c.wg.Done()
	defer close(c.done)
	for {
		p, files, err := c.conn.recv()
		closeAll(files)
		if err != nil {
			return
		}
		switch p.Op {
		case opReply:
			c.mu.Lock()
			ch := c.calls[p.ID]
			delete(c.calls, p.ID)
			c.mu.Unlock()
			if ch != nil {
				ch <- p // has room for its one reply
			}
		case opEvent:
			m, err := decode[eventMsg](p)
			if err != nil {
				continue
			}
			c.event(m)
		}
	}
}

func (c *Client) event(m eventMsg) {
	if m.Kind == keeperChanged {
		c.mu.Lock()
		c.who.Keeper = int(m.Stats.Faults)
		c.who.KeeperStart, _ = startTime(c.who.Keeper)
		c.mu.Unlock()
		return
	}
	c.queueEvent(Event{Kind: m.Kind, Stats: m.Stats, Lane: m.Lane, Err: errorOf(m.Err, m.Code)})
}

// queueEvent never waits: replies come on the same connection. A Progress that
// nobody has taken yet is replaced by a newer one.
func (c *Client) queueEvent(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.queue); e.Kind == Progress && n > 0 && c.queue[n-1].Kind == Progress {
		c.queue[n-1] = e
		return
	}
	c.queue = append(c.queue, e)
	select {
	case c.queued <- struct{}{}:
	default:
	}
}

// deliver hands out events until there will be no more.
func (c *Client) deliver() {
	defer c.wg.Done()
	defer close(c.events)
	for {
		c.mu.Lock()
		list := c.queue
		c.queue = nil
		c.mu.Unlock()
		for _, e := range list {
			select {
			case c.events <- e:
			case <-c.closed:
				return
			}
			if e.Kind == Exited {
				return
			}
		}
		if len(list) > 0 {
			continue
		}
		select {
		case <-c.queued:
		case <-c.closed:
			return
		}
	}
}

// watch waits for the end of the pager: its connection alone would not tell,
// because the keeper holds the other end open as well.
func (c *Client) watch() {
	defer c.wg.Done()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		for pid := c.PID(); !waitProcess(c.pidfd, 500*time.Millisecond) && !over(c.pidfd, pid); {
			select {
			case <-c.closed:
				return
			default:
			}
		}
	}()
	select {
	case <-exited:
	case <-c.closed:
		<-exited
	}
	gone := over(c.pidfd, c.PID())
	if gone {
		// What it said last is in the socket already, and nothing ends it: the
		// keeper holds the other end.
		_ = c.conn.c.CloseRead()
	} else {
		_ = c.conn.c.Close()
	}
	<-c.done
	_ = c.conn.c.Close()
	if c.reap != nil {
		if waitProcess(c.pidfd, 0) {
			c.reap()
		} else {
			go c.reap() // it is our child still, whenever it ends
		}
	}
	c.mu.Lock()
	finished := c.finished
	_ = unix.Close(c.pidfd)
	c.pidfd = -1
	c.mu.Unlock()
	if gone {
		e := Event{Kind: Exited}
		if !finished {
			e.Err = ErrGone
		}
		c.queueEvent(e)
	}
}

// call sends a request and waits for its reply.
func (c *Client) call(ctx context.Context, o op, body any, files ...*os.File) (packet, error) {
	ch := make(chan packet, 1)
	c.mu.Lock()
	c.next++
	id := c.next
	c.calls[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.calls, id)
		c.mu.Unlock()
	}()
	if err := c.conn.send(packet{ID: id, Op: o}, body, files...); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) {
			err = fmt.Errorf("%w: %w", ErrGone, err)
		}
		return packet{}, err
	}
	select {
	case p := <-ch:
		return p, errorOf(p.Err, p.Code)
	case <-ctx.Done():
		return packet{}, fmt.Errorf("pager %d: %s: %w", c.PID(), o, ctx.Err())
	case <-c.done:
	}
	select { // it may have come last
	case p := <-ch:
		return p, errorOf(p.Err, p.Code)
	default:
		return packet{}, fmt.Errorf("pager %d: %s: %w", c.PID(), o, ErrGone)
	}
}

// AttachLane gives the pager a connection whose preamble has not been read. key
// is the one-time key of the epoch. path is the RDMA device that leads to the peer, for
// a lane that may go on over it, and noPath why there is none; f stays the caller's.
func (c *Client) AttachLane(ctx context.Context, id transport.LaneID, key []byte, f *os.File, path *rdma.Path, noPath error) error {
	m := laneMsg{Lane: id, Key: key, Path: path}
	if noPath != nil {
		m.NoPath = noPath.Error()
	}
	_, err := c.call(ctx, opLane, m, f)
	return err
}

// NewEpoch closes all lanes; lanes of another epoch are refused from here on.
func (c *Client) NewEpoch(ctx context.Context, epoch uint32) error {
	_, err := c.call(ctx, opEpoch, epochMsg{epoch})
	return err
}

// AttachFile makes a file a source of pages, in the place of lanes. The file
// stays the caller's.
func (c *Client) AttachFile(ctx context.Context, pf PageFile) error {
	_, err := c.call(ctx, opFile, fileMsg{pf.Space, pf.Index, pf.Sums}, pf.File)
	return err
}

// Adopt hands over an address space. Its faults are served from then on. The
// files stay the caller's, who should close them when it returns.
func (c *Client) Adopt(ctx context.Context, a Adoption) error {
	m := adoptMsg{
		Space: a.Space, PID: a.PID, UFFD: a.UFFD != nil, Mem: a.Mem != nil, Regions: a.Regions,
		Lazy: a.Lazy, Eager: a.Eager, Hot: a.Hot, Veil: a.Veil != nil, Views: a.Views, Kept: a.Kept, Group: a.Group, Shown: a.Shown,
	}
	var files []*os.File
	for _, f := range []*os.File{a.UFFD, a.Mem, a.Veil} {
		if f != nil {
			files = append(files, f)
		}
	}
	_, err := c.call(ctx, opAdopt, m, files...)
	return err
}

// Fetch begins the background stream; before it only faults, eager and hot pages
// are fetched, from Adopt on. Idempotent.
func (c *Client) Fetch(ctx context.Context) error {
	_, err := c.call(ctx, opFetch, nil)
	return err
}

// WaitEager waits until every eager page of what was adopted is in place. Broken lanes do not end it: new ones may come.
func (c *Client) WaitEager(ctx context.Context) error {
	_, err := c.call(ctx, opWaitEager, nil)
	return err
}

// WaitResident waits until every page has arrived. ErrLost if they never will.
func (c *Client) WaitResident(ctx context.Context) error {
	_, err := c.call(ctx, opWaitResident, nil)
	return err
}

// Stats is a fresh snapshot.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	p, err := c.call(ctx, opStats, nil)
	if err != nil {
		return Stats{}, err
	}
	return decode[Stats](p)
}

// Poison makes every missing page raise SIGBUS at its next touch, because the
// source is lost for good.
func (c *Client) Poison(ctx context.Context) error {
	_, err := c.call(ctx, opPoison, nil)
	return err
}

// Free leaves plain memory behind, as Finish does, but the pager stays and goes on
// showing the source's memory. It fails, and changes nothing, while a page is missing.
// Idempotent.
func (c *Client) Free(ctx context.Context) error {
	_, err := c.call(ctx, opFree, nil)
	return err
}

// Finish leaves plain memory behind and ends pager and keeper. It fails, and
// changes nothing, while a page is missing.
func (c *Client) Finish(ctx context.Context) error {
	c.mu.Lock()
	keeper, start := c.who.Keeper, c.who.KeeperStart
	c.finished = true
	c.mu.Unlock()
	if _, err := c.call(ctx, opFinish, nil); err != nil {
		c.mu.Lock()
		c.finished = false
		c.mu.Unlock()
		return err
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		return fmt.Errorf("pager %d: end: %w", c.PID(), ctx.Err())
	}
	return endKeeper(keeper, start)
}

// Abort kills pager and keeper. What they served reads zeros from then on, so
// the process must be dead before. Idempotent.
func (c *Client) Abort(ctx context.Context) error {
	c.mu.Lock()
	w := c.who
	c.finished = true
	c.mu.Unlock()
	return endAll(w, c.cfg.Dir)
}

// Close lets go of the pager, which lives on. Idempotent.
func (c *Client) Close() error {
	c.once.Do(func() { close(c.closed) })
	c.wg.Wait()
	return nil
}
