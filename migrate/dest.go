package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/pageferry/pageferry/transport"
)

// DestinationConfig is what a Destination is made of. It owns none of it.
type DestinationConfig struct {
	Host     Host
	Journals Journals
	Hello    Hello // of this host; Version and Incarnation are filled in

	Timeouts   Timeouts
	Log        *slog.Logger   // nil discards
	OnProgress func(Progress) // at every change; must not block
	KillPoint  func(string)   // tests end the daemon here; nil for none
}

// Destination is the receiving end of a daemon: all migrations that arrive or
// have arrived and are not settled yet. Make it with NewDestination, call
// Recover once before the first Serve, and Close at the end. Its methods may be
// called by any goroutine.
//
// Every arrival has a turn, taken by whoever moves it: a connection, its own
// goroutine that waits for the last page, a person. Destination.mu is never
// held while a turn is waited for.
type Destination struct {
	cfg DestinationConfig
	log *slog.Logger
	t   Timeouts

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu       sync.Mutex // guards the next
	closed   bool
	arriving map[transport.MigrationID]*arriving
	wg       sync.WaitGroup // Add under mu, not after closed
}

// NewDestination checks the configuration.
func NewDestination(cfg DestinationConfig) (*Destination, error) {
	if cfg.Host == nil || cfg.Journals == nil {
		return nil, errors.New("migrate: destination without host or journals")
	}
	d := &Destination{cfg: cfg, log: cfg.Log, t: cfg.Timeouts.WithDefaults(), arriving: map[transport.MigrationID]*arriving{}}
	if d.log == nil {
		d.log = discard
	}
	d.cfg.Hello.Version = ProtocolVersion
	d.cfg.Hello.Incarnation = cfg.Journals.Incarnation()
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

// Close ends all connections and waits for what is under way. What is not ready
// yet is aborted; processes that are frozen or run, and their pagers, stay as
// they are for the next daemon.
func (d *Destination) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.cancel()
	d.wg.Wait()
	d.mu.Lock()
	as := d.arriving
	d.arriving = map[transport.MigrationID]*arriving{}
	d.mu.Unlock()
	var err error
	for _, a := range as {
		err = errors.Join(err, a.letGo())
	}
	return err
}

// begin counts a goroutine in, or reports that the destination is closed.
func (d *Destination) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.wg.Add(1)
	return true
}

// List is a snapshot of every arrival.
func (d *Destination) List() []Progress {
	d.mu.Lock()
	as := make([]*arriving, 0, len(d.arriving))
	for _, a := range d.arriving {
		as = append(as, a)
	}
	d.mu.Unlock()
	ps := make([]Progress, 0, len(as))
	for _, a := range as {
		a.refresh()
		ps = append(ps, a.snapshot())
	}
	return ps
}

func (d *Destination) find(id transport.MigrationID) *arriving {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.arriving[id]
}

// add takes an arrival in, unless its id is there.
func (d *Destination) add(a *arriving) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.arriving[a.id] != nil {
		return false
	}
	d.arriving[a.id] = a
	return true
}

func (d *Destination) drop(a *arriving) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.arriving[a.id] == a {
		delete(d.arriving, a.id)
	}
}

func (d *Destination) kill(point string) {
	if d.cfg.KillPoint != nil {
		d.cfg.KillPoint("destination/" + point)
	}
}

// Serve speaks with one source on an accepted control lane until that ends, and
// owns the lane. The error is for the log: whatever happens to a connection,
// arrivals live on as their state says.
func (d *Destination) Serve(ctx context.Context, lane transport.Lane, peer transport.Peer) error {
	if !d.begin() {
		lane.Close()
		return transport.ErrClosed
	}
	defer d.wg.Done()
	ctx, stop := follow(ctx, d.ctx)
	defer stop()
	c := newControl(lane, peer, d.t.Peer, d.log)
	defer c.close()
	err := d.serve(ctx, c)
	if errors.Is(err, transport.ErrPeer) || errors.Is(err, transport.ErrClosed) {
		return nil
	}
	return err
}

func (d *Destination) serve(ctx context.Context, c *control) error {
	err := c.hear(ctx, d.cfg.Hello, d.t.Hello)
	if errors.Is(err, ErrVersion) {
		return errors.Join(err, c.send(refuseMsg{Reasons: []string{err.Error()}}))
	}
	if err != nil {
		return err
	}
	d.kill("recv/hello")
	if err := d.send(c, d.cfg.Hello); err != nil {
		return err
	}
	// A source may keep a connection ready before it has something to say.
	r, err := c.recv(ctx)
	if err != nil {
		return err
	}
	d.kill("recv/" + r.msg.kind().String())
	switch m := r.msg.(type) {
	case *offerMsg:
		m.Offer.Heard = r.at
		return d.serveOffer(ctx, c, m)
	case *resumeMsg:
		return d.serveResume(ctx, c, m)
	}
	return unexpected(r.msg, "offer or resume")
}

func (d *Destination) send(c *control, m message) error {
	point := "send/" + m.kind().String()
	d.kill(point + "/before")
	if err := c.send(m); err != nil {
		return err
	}
	d.kill(point + "/after")
	return nil
}

// serveOffer takes a new migration from OFFER to its end or the connection's.
func (d *Destination) serveOffer(ctx context.Context, c *control, m *offerMsg) error {
	a := newArriving(d, transport.MigrationID(m.Migration))
	a.turn <- struct{}{} // its first owner
	a.offered(m.Offer, c)
	if !d.add(a) {
		return d.refuse(c, fmt.Errorf("migration %v is known here already", a.id))
	}
	a.setConn(c)
	if err := a.prepare(ctx, c, m.Offer); err != nil {
		if a.State() != DestAborted { // abort has forgotten it, or keeps it to try again
			d.drop(a)
			err = errors.Join(err, a.letGo())
		}
		a.give()
		return d.refuse(c, err)
	}
	err := a.rebuild(ctx, c)
	if a.State() != DestReady {
		// The source, whose process stands still or runs, aborts as well.
		if err == nil {
			err = errors.New("not rebuilt")
		}
		aerr := a.abort(ctx, clip(err.Error(), MaxReason), false)
		a.give()
		if aerr != nil {
			return errors.Join(err, aerr)
		}
		return errors.Join(err, d.send(c, abortedMsg{Reason: clip(err.Error(), MaxReason)}))
	}
	a.give()
	if err != nil {
		return err
	}
	return a.converse(ctx, c)
}

// refuse says why, naming each reason.
func (d *Destination) refuse(c *control, why error) error {
	reasons := []string{why.Error()}
	if r, ok := errors.AsType[*Refusal](why); ok && len(r.Reasons) > 0 {
		reasons = r.Reasons
	}
	return d.send(c, refuseMsg{Reasons: reasons})
}

// serveResume answers a source that comes back.
func (d *Destination) serveResume(ctx context.Context, c *control, m *resumeMsg) error {
	a := d.find(transport.MigrationID(m.Migration))
	if a == nil {
		var err error
		if a, err = d.rediscover(ctx, m); err != nil {
			return errors.Join(err, d.send(c, retryMsg{Reason: clip(err.Error(), MaxReason)}))
		}
		if a == nil {
			return d.send(c, resumeAckMsg{})
		}
	}
	if !a.owns(c) {
		d.log.Warn("another host speaks of a migration that is not its own", "migration", a.id, "peer", c.peer.Name)
		return d.refuse(c, fmt.Errorf("migration %v did not come from %q with that journal", a.id, c.peer.Name))
	}
	a.setConn(c) // ends an older connection, which may wait for nothing any more
	ack, err := a.resume(ctx, c, m)
	if err != nil {
		return errors.Join(err, d.send(c, retryMsg{Reason: clip(err.Error(), MaxReason)}))
	}
	if err := d.send(c, ack); err != nil {
		return err
	}
	if !ack.Known || ack.State == DestAborted || ack.State == DestDone {
		return nil
	}
	return a.converse(ctx, c)
}

// rediscover looks in the journals for a migration that is not in memory. Neither
// an arrival nor an error means to its source that it was aborted here. What is
// in a journal all the same could not be read, forgotten or written when it was
// tried, and is taken up now; one that is damaged is an error.
func (d *Destination) rediscover(ctx context.Context, m *resumeMsg) (*arriving, error) {
	id := transport.MigrationID(m.Migration)
	j, err := d.cfg.Journals.Open(id, RoleDestination)
	if errors.Is(err, ErrNoJournal) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rec, err := j.Last()
	if err = errors.Join(err, j.Close()); err != nil {
		return nil, err
	}
	// What is over, but could not be removed.
	if m.Intent == intentDone || rec.State == DestAborted.String() {
		return nil, nil
	}
	if err := d.recoverOne(ctx, rec); err != nil {
		return nil, err
	}
	return d.find(id), nil
}
