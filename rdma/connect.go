package rdma

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/rdma/verbs"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Config is how a lane is made. Device and Pool have no default.
type Config struct {
	Device *Device
	// Pool is what payloads are received into. It, and the pools of all payloads
	// that are sent, must stay open until the lane is closed.
	Pool *transport.Pool
	// Spin is the longest time that Recv and ReadRemote poll before they sleep, if
	// they learn that it helps. Zero means 50 us, and on an urgent lane a millisecond for
	// Recv, and 5 for ReadRemote, which waits for a device and never for a peer that
	// has nothing to say.
	Spin time.Duration
	// AckTimeout is the exponent of the time until an unanswered packet is
	// repeated, 4.096 us * 2^AckTimeout, up to six times. Zero means 16: a quarter of
	// a second, so that a dead link is noticed by who sends in two to eight.
	AckTimeout int
	// Linger bounds how long Close waits for what was sent to arrive. Zero means
	// a second.
	Linger time.Duration
}

// Sizes of a lane's rings. One page with its header and meta fits into a slot.
const (
	slotSize    = 8 << 10
	dataSlots   = 64
	maxRefs     = 32
	recvSlots   = dataSlots + maxRefs + 3 // see chunk
	sendSlots   = 32
	remoteReads = 16 // of ReadRemote at a time
	allReads    = maxRefs + remoteReads
	// inlinePayload and less is copied into the stream: a page costs less to
	// copy than a second round trip.
	inlinePayload = 4096
)

// Connect makes an RDMA lane of the identity of over, an authenticated lane to
// the peer that nothing was sent on yet, and whose peer does the same. On success
// the new lane owns over, and nobody else may use it. On failure over is as
// usable as before, if the error wraps ErrRefused at one end; else it is closed.
func Connect(ctx context.Context, over transport.Lane, cfg Config) (*Lane, error) {
	stop := context.AfterFunc(ctx, func() { over.Close() })
	l, err := connect(over, cfg)
	if !stop() && err == nil {
		err = errors.Join(context.Cause(ctx), l.Close())
	}
	if err != nil {
		id := over.ID()
		return nil, fmt.Errorf("rdma: %s lane %d over %s: %w", id.Kind, id.Index, cfg.Device.path.Device, err)
	}
	return l, nil
}

func connect(over transport.Lane, cfg Config) (*Lane, error) {
	id := over.ID()
	mine := offer{Magic: offerMagic, Version: offerVersion, Kind: uint8(id.Kind), Index: id.Index, Migration: id.Migration, Epoch: id.Epoch}
	l, err := newLane(over, cfg)
	if err != nil {
		mine.Refused = 1
		theirs := exchange(over, mine.encode(err.Error()), nil)
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrRefused, err), theirs)
	}
	lim := cfg.Device.limits
	mine.GID, mine.MTU, mine.ReadDepth = lim.GID, lim.MTU, lim.ReadDepth
	mine.QPN, mine.PSN, mine.ReadQPN, mine.ReadPSN = l.qp.QPN, rand.Uint32()>>8, l.readQP.QPN, rand.Uint32()>>8
	mine.SlotSize, mine.Credits, mine.Refs = slotSize, dataSlots, maxRefs
	if cfg.Device.path.Soft {
		// rxe ends a queue pair on which a packet of a SEND of several is lost (up to
		// Linux 6.12 at least): a chunk is one packet.
		mine.SlotSize = min(slotSize, lim.MTU)
	}
	var theirs offer
	err = exchange(over, mine.encode(""), func(b []byte) (err error) {
		theirs, err = parseOffer(b, id)
		return err
	})
	if err == nil {
		err = l.join(&mine, &theirs)
		reason := ""
		if err != nil {
			mine.Refused, reason = 1, err.Error()
		}
		// Nothing may be sent before the peer's queue pair is ready to receive.
		err = errors.Join(err, exchange(over, mine.encode(reason), func(b []byte) error {
			_, err := parseOffer(b, id)
			return err
		}))
	}
	if err != nil {
		l.discard()
		if !errors.Is(err, ErrRefused) {
			over.Close()
		}
		return nil, err
	}
	l.start()
	return l, nil
}

// Refuse is what an end does in place of Connect when it will not make a lane, for
// a reason that the peer is told. over is as usable as before, unless it returns an error.
func Refuse(ctx context.Context, over transport.Lane, reason error) error {
	stop := context.AfterFunc(ctx, func() { over.Close() })
	id := over.ID()
	mine := offer{Magic: offerMagic, Version: offerVersion, Kind: uint8(id.Kind), Index: id.Index, Migration: id.Migration, Epoch: id.Epoch, Refused: 1}
	err := exchange(over, mine.encode(reason.Error()), nil)
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("rdma: refuse %s lane %d: %w", id.Kind, id.Index, err), over.Close())
	}
	return nil
}

// exchange sends a message on over and gives what comes back to parse.
func exchange(over transport.Lane, b []byte, parse func([]byte) error) error {
	if err := over.Send(transport.Frame{Type: wire.TypeMessage, Meta: b}); err != nil {
		return err
	}
	f, err := over.Recv()
	if err != nil {
		return err
	}
	f.Payload.Release()
	if f.Type != wire.TypeMessage {
		return fmt.Errorf("%w: %s in place of the offer of an RDMA lane", transport.ErrDamaged, f.Type)
	}
	if parse == nil {
		return nil
	}
	return parse(f.Meta)
}

// newLane makes all that a lane needs at this end, up to posted receives.
func newLane(over transport.Lane, cfg Config) (l *Lane, err error) {
	recvSpin, readSpin := spin{most: cfg.Spin}, spin{most: cfg.Spin}
	if cfg.Spin == 0 {
		recvSpin.most, readSpin.most = 50*time.Microsecond, 50*time.Microsecond
		if over.ID().Kind == transport.Urgent {
			recvSpin.most, readSpin.most = time.Millisecond, 5*time.Millisecond
		}
	}
	if cfg.Linger == 0 {
		cfg.Linger = time.Second
	}
	if cfg.AckTimeout == 0 {
		cfg.AckTimeout = 16
	}
	d := cfg.Device
	if lim := d.limits; lim.MaxWR < max(recvSlots, sendSlots, allReads) || lim.MaxCQE < recvSlots+sendSlots+allReads {
		return nil, fmt.Errorf("%s takes %d requests and %d completions, too few", d.path.Device, lim.MaxWR, lim.MaxCQE)
	}
	l = &Lane{id: over.ID(), dev: d, cfg: cfg, over: over, keys: map[*transport.Pool]*verbs.Region{}, recvSpin: recvSpin, readSpin: readSpin,
		done: make(chan struct{}), kick: make(chan struct{}, 1), engineDone: make(chan struct{}), watchDone: make(chan struct{})}
	l.recvCond, l.sendCond = sync.NewCond(&l.mu), sync.NewCond(&l.mu)
	defer func() {
		if err != nil {
			l.discard()
			l = nil
		}
	}()
	if l.ring, err = unix.Mmap(-1, 0, (recvSlots+sendSlots)*slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return l, fmt.Errorf("map %d bytes: %w", (recvSlots+sendSlots)*slotSize, err)
	}
	_ = unix.Madvise(l.ring, unix.MADV_DONTFORK) // only saves memory
	l.ringAddr = uint64(sys.Address(l.ring))
	if l.ringMR, err = d.v.Register(l.ring, verbs.LocalWrite); err != nil {
		return l, err
	}
	if err := l.usePool(cfg.Pool); err != nil {
		return l, err
	}
	if l.cq, err = d.v.NewCQ(recvSlots + sendSlots + allReads); err != nil {
		return l, err
	}
	if l.qp, err = d.v.NewQP(l.cq, sendSlots, recvSlots, d.path.Port); err != nil {
		return l, err
	}
	if l.readQP, err = d.v.NewQP(l.cq, allReads, 1, d.path.Port); err != nil {
		return l, err
	}
	for i := range allReads {
		l.freeReads = append(l.freeReads, i)
	}
	for i := range recvSlots {
		l.repost(i)
	}
	if err := l.flushRecv(); err != nil {
		return l, err
	}
	return l, d.enter(l)
}

// join connects the queue pairs to the peer's.
func (l *Lane) join(mine, theirs *offer) error {
	l.credits, l.maxRefs = int(theirs.Credits), int(min(theirs.Refs, maxRefs))
	l.chunkSize = int(min(theirs.SlotSize, slotSize))
	p := verbs.Peer{
		GID: theirs.GID, QPN: theirs.QPN, PSN: theirs.PSN, MyPSN: mine.PSN, MTU: min(mine.MTU, theirs.MTU),
		Port: uint32(l.dev.path.Port), GIDIndex: uint32(l.dev.path.GIDIndex),
		ReadInitiate: min(l.dev.limits.ReadInitiate, theirs.ReadDepth, 255), ReadDepth: min(l.dev.limits.ReadDepth, 255),
		Timeout: uint32(l.cfg.AckTimeout), Retries: 6, // rxe takes 7 for "for ever"
	}
	err := l.qp.Connect(&p)
	if err == nil {
		p.QPN, p.PSN, p.MyPSN = theirs.ReadQPN, theirs.ReadPSN, mine.ReadPSN
		err = l.readQP.Connect(&p)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}

func (l *Lane) start() {
	l.started = true
	go l.engine()
	go l.watch()
}
