package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/pageferry/pageferry/transport"
)

var (
	// ErrCommitted: too late to cancel.
	ErrCommitted = errors.New("migrate: already committed; the process belongs to the destination")
	// ErrCancelled: Cancel was called.
	ErrCancelled = errors.New("migrate: cancelled")
	// ErrInDoubt and ErrLost are the errors of these outcomes.
	ErrInDoubt = errors.New("migrate: in doubt")
	ErrLost    = errors.New("migrate: lost")
	// ErrInterrupted: the context ended after the commit.
	ErrInterrupted = errors.New("migrate: interrupted after the commit; the journal has it")
	// errGivenUp: the destination has durably given its copy up.
	errGivenUp = errors.New("migrate: the destination gave it up")
)

// SourceConfig is what a Source is made of. It owns none of it.
type SourceConfig struct {
	ID       transport.MigrationID
	Process  Process
	Lanes    Lanes
	Journals Journals
	// Dial connects a control lane to the destination, authenticated.
	Dial func(ctx context.Context) (transport.Lane, transport.Peer, error)
	// Address of the destination, for the journal: a restarted daemon dials it.
	Address string
	Hello   Hello // of this host; Version and Incarnation are filled in
	Offer   Offer // also says the mode; not needed to Recover
	// Clocks reads those of the process anew when the offer is sent. Nil: those of
	// the offer are sent.
	Clocks func() (monotonic, boottime time.Duration, err error)

	// MaxDowntime is how long the program may stand still at the switch, as far as
	// that can be foreseen; 0 is 300 ms, in ModeHybrid 50 ms. Throttle is how much
	// of its time it may be kept from running so that ModePreCopy converges, below 1.
	MaxDowntime time.Duration
	Throttle    float64
	// AddressOrder sends every round by address, with nothing held back until the
	// switch: what the order of last writes is compared with. Not for use.
	AddressOrder bool

	// Auto lets the model decide whether rounds pay. The offer says ModeHybrid:
	// without rounds that is post-copy. Where the process cannot be tracked there
	// are none.
	Auto bool

	// BeforeCommit is called with the process held. An error aborts.
	BeforeCommit func(ctx context.Context) error
	// AtSwitch is called once COMMIT is durable and sent, and again by a
	// restarted daemon: what must be undone at the source because the process
	// now lives elsewhere, such as its connections. An error is only logged.
	AtSwitch func(ctx context.Context) error
	// OnSourceExit is called before the copy is killed, perhaps more than once.
	// An error is only logged.
	OnSourceExit func(ctx context.Context) error

	Timeouts   Timeouts
	Log        *slog.Logger   // nil discards
	OnProgress func(Progress) // at every change; must not block
	KillPoint  func(string)   // tests end the daemon here; nil for none
}

// Source moves one process away. Make it with NewSource, then call Run for a
// new migration or Recover for one in the journal. Its methods may be called by
// any goroutine.
type Source struct {
	cfg SourceConfig
	log *slog.Logger
	t   Timeouts

	// turn is held by Run, Recover, Settle and Resolve, one at a time: it is
	// waited for with a context, and kept across I/O as a lock must not be.
	turn chan struct{}

	mu       sync.Mutex // guards the next
	state    SourceState
	cancel   context.CancelCauseFunc // of what precedes the commit; nil when too late
	nudge    context.CancelCauseFunc // of the current attempt after it
	pending  decision
	progress Progress
	wire     rate
	pages    rate

	// The rest belongs to whoever has the turn.
	journal     Journal // nil where there is none (any more)
	rec         Record
	offered     bool // the destination may know of it
	touched     bool // the process must be thawed on abort
	commitTried bool // a record COMMIT may be on the disk
	switched    bool // AtSwitch was called, by this daemon
	nothing     bool // lost, and nothing is left here that could be resolved
	times       times
	res         Result
}

// times are moments by this host's clock.
type times struct {
	start, freeze, frozen, sent, ready, held, committed, running, resident time.Time
}

// decision is what a person resolved.
type decision uint8

const (
	decideNothing decision = iota
	decideCommit
	decideAbort
)

var discard = slog.New(slog.DiscardHandler)

// NewSource checks the configuration. Nothing happens before Run or Recover.
func NewSource(cfg SourceConfig) (*Source, error) {
	switch {
	case cfg.ID == transport.MigrationID{}:
		return nil, errors.New("migrate: source without an id")
	case cfg.Process == nil || cfg.Lanes == nil || cfg.Journals == nil || cfg.Dial == nil:
		return nil, errors.New("migrate: source without process, lanes, journals or a way to dial")
	}
	s := &Source{cfg: cfg, log: cfg.Log, t: cfg.Timeouts.WithDefaults(), turn: make(chan struct{}, 1)}
	if s.log == nil {
		s.log = discard
	}
	s.log = s.log.With("migration", cfg.ID, "role", RoleSource)
	s.cfg.Hello.Version = ProtocolVersion
	s.cfg.Hello.Incarnation = cfg.Journals.Incarnation()
	s.rec = Record{
		Migration: cfg.ID, Role: RoleSource, Mode: cfg.Offer.Mode, PeerAddress: cfg.Address,
		SourcePID: cfg.Offer.HostPID, Comm: cfg.Offer.Comm,
	}
	s.progress = Progress{ID: cfg.ID, Role: RoleSource, State: SourceRunning.String(), Comm: cfg.Offer.Comm,
		PID: cfg.Offer.HostPID, BytesMemory: cfg.Offer.MemoryBytes, Peer: cfg.Address}
	return s, nil
}

// State is where it stands.
func (s *Source) State() SourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Progress is a snapshot.
func (s *Source) Progress() Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.progress
}

// Cancel ends what has not been committed, or says that it is too late. Run
// returns when the process runs on.
func (s *Source) Cancel() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cancel == nil {
		if s.state.Committed() {
			return ErrCommitted
		}
		return nil
	}
	s.cancel(ErrCancelled)
	return nil
}

func (s *Source) take(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Source) give() { <-s.turn }

func (s *Source) kill(point string) {
	if s.cfg.KillPoint != nil {
		s.cfg.KillPoint("source/" + point)
	}
}

// between calls f between two kill points.
func (s *Source) between(point string, f func() error) error {
	s.kill(point + "/before")
	if err := f(); err != nil {
		return err
	}
	s.kill(point + "/after")
	return nil
}

func (s *Source) engine(name string, f func() error) error {
	if err := s.between("engine/"+name, f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (s *Source) hook(ctx context.Context, name string, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	return s.engine(name, func() error { return f(ctx) })
}

func (s *Source) send(c *control, m message, blobs ...[]byte) error {
	return s.between("send/"+m.kind().String(), func() error { return c.send(m, blobs...) })
}

// recv is c.recv with a kill point, progress taken care of.
func (s *Source) recv(ctx context.Context, c *control) (received, error) {
	r, err := c.recv(ctx)
	if err != nil {
		return r, err
	}
	if p, ok := r.msg.(*progressMsg); ok {
		s.note(p.Stats.arrival())
	} else {
		s.kill("recv/" + r.msg.kind().String())
	}
	return r, nil
}

// enter moves to next without a record.
func (s *Source) enter(next SourceState) error {
	s.mu.Lock()
	st, err := s.state.To(next)
	if err != nil {
		s.mu.Unlock()
		s.log.Error("illegal transition", "err", err)
		return err
	}
	s.state = st
	s.progress.State = st.String()
	s.mu.Unlock()
	s.tell("")
	return nil
}

// record moves to next, durably: it is journalled first.
func (s *Source) record(next SourceState, reason string) error {
	if _, err := s.State().To(next); err != nil {
		s.log.Error("illegal transition", "err", err)
		return err
	}
	r := s.rec
	r.State, r.Time = next.String(), time.Now()
	if reason != "" {
		r.Reason = reason
	}
	if err := r.describe(s.cfg.Process, s.journal == nil); err != nil {
		return err
	}
	err := s.between("journal/"+next.String(), func() error {
		if s.journal != nil {
			return s.journal.Append(r)
		}
		j, err := s.cfg.Journals.Create(r)
		s.journal = j
		return err
	})
	if err != nil {
		return fmt.Errorf("journal %v: %w", next, err)
	}
	s.rec = r
	return s.enter(next)
}

// insist records until it is durable or ctx ends.
func (s *Source) insist(ctx context.Context, next SourceState, reason string) error {
	b := backoff{t: s.t}
	for {
		err := s.record(next, reason)
		if err == nil || errors.Is(err, ErrIllegal) {
			return err
		}
		s.log.Error("the journal cannot be written", "state", next, "err", err)
		s.tell(err.Error())
		if !b.wait(ctx) {
			return err
		}
	}
}

// forget ends the journal: both sides know.
func (s *Source) forget() {
	if s.journal == nil {
		return
	}
	err := s.between("journal/remove", s.journal.Remove)
	if err != nil {
		// It says what is true, and is tried again at the next start.
		s.log.Warn("journal not removed", "err", err)
		_ = s.journal.Close()
	}
	s.journal = nil
}

// undo calls f, with the time that one attempt has, until it works or there is
// nothing left to work on. It is not stopped by a context that has ended, but
// does not go on for ever.
func (s *Source) undo(ctx context.Context, name string, f func(context.Context) error) error {
	b := backoff{t: s.t}
	free := context.WithoutCancel(ctx)
	var err error
	for range undoAttempts {
		one, stop := context.WithTimeout(free, s.t.Undo)
		err = s.engine(name, func() error { return f(one) })
		stop()
		if err == nil || errors.Is(err, ErrGone) {
			return err
		}
		s.log.Warn("not undone yet", "what", name, "err", err)
		if !b.wait(free) {
			break
		}
	}
	return err
}

const undoAttempts = 6

// tell publishes progress; trouble is "" where there is none.
func (s *Source) tell(trouble string) {
	bytes, now := s.cfg.Lanes.BytesSent(), time.Now()
	s.mu.Lock()
	s.progress.Reason = trouble
	s.progress.BytesWire = bytes
	s.progress.Elapsed = now.Sub(s.progress.Started)
	s.progress.WireBytesPerSecond = s.wire.update(now, s.progress.BytesWire)
	s.progress.PagesPerSecond = s.pages.update(now, s.progress.PagesResident)
	p := s.progress
	s.mu.Unlock()
	if s.cfg.OnProgress != nil {
		s.cfg.OnProgress(p)
	}
}

// note takes over what the destination counts.
func (s *Source) note(st ArrivalStats) {
	s.mu.Lock()
	s.progress.ArrivalStats = st
	s.mu.Unlock()
	s.tell("")
}
