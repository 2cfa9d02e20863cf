package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/pace"
	"github.com/pageferry/pageferry/wire"
)

// PageReader reads the frozen process; see migrate.Process.
type PageReader interface {
	// ReadPages copies the pages of rs one after the other into buf. Safe for
	// concurrent use.
	ReadPages(space page.Space, rs []page.Range, buf []byte) error
}

// ErrGone is wrapped by a PageReader's error when the pages can never be had
// again.
var ErrGone = errors.New("stream: the source's pages are gone")

// ServerConfig is how a server works; Reader must be set.
type ServerConfig struct {
	Reader PageReader
	// BufferSize is the largest payload of a frame. Default 256 KiB.
	BufferSize int
	// Buffers is how many of them there are for all lanes together; with one
	// for each lane none waits for another. Default 4.
	Buffers int
	// OnUrgent is called on the thread that serves an urgent lane, which is its
	// own, to raise its priority. May be nil.
	OnUrgent func()
	// Limiter says when a frame may go; others may share it. Default nil: none.
	// Frames are cut so small that the limit holds in every second.
	Limiter *pace.Limiter
	// Compress is what is compressed. Default: what gets across sooner.
	Compress codec.Mode
	Log      *slog.Logger // nil discards
}

// Server answers requests for pages. It keeps nothing about them but what saves
// sending them again; see Round.
type Server struct {
	cfg      ServerConfig
	pool     *transport.Pool
	compress *compression
}

// NewServer sets the server's buffers aside; Close gives them back.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.BufferSize == 0 {
		cfg.BufferSize = 256 << 10
	}
	if cfg.Buffers == 0 {
		cfg.Buffers = 4
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.BufferSize > wire.MaxPayload {
		return nil, fmt.Errorf("stream: buffers of %d bytes, a frame holds %d", cfg.BufferSize, wire.MaxPayload)
	}
	pool, err := transport.NewPool(cfg.Buffers, cfg.BufferSize)
	if err != nil {
		return nil, err
	}
	return &Server{cfg, pool, newCompression(cfg.Compress)}, nil
}

// Serve answers what comes on lane until it ends or ctx does, and closes it.
// The error says why; it is nil when the peer or ctx ended it in good order.
// Several lanes are served by as many calls.
func (s *Server) Serve(ctx context.Context, lane transport.Lane) error {
	defer lane.Close()
	stop := context.AfterFunc(ctx, func() { lane.Close() })
	defer stop()
	if lane.ID().Kind == transport.Urgent {
		runtime.LockOSThread() // and never unlocked: the thread ends with its priority
		if s.cfg.OnUrgent != nil {
			s.cfg.OnUrgent()
		}
	}
	err := s.serve(ctx, lane)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (s *Server) serve(ctx context.Context, lane transport.Lane) error {
	g := s.compress.newGauge(lane, float64(s.cfg.Limiter.BytesPerSecond())/float64(max(1, s.cfg.Buffers-1)))
	a := answer{reader: s.cfg.Reader, pool: s.pool, done: ctx.Done(), limit: s.cfg.Limiter, enc: g.enc}
	for {
		f, err := lane.Recv()
		if err != nil {
			return err
		}
		f.Payload.Release()
		switch f.Type {
		case wire.TypeWant:
		case wire.TypePing:
			if err := s.sendPaced(ctx, lane, transport.Frame{Type: wire.TypePong, Meta: slices.Clone(f.Meta)}); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("%w: %v on a page lane of the source", transport.ErrDamaged, f.Type)
		}
		if err := a.begin(f.Meta); err != nil {
			return fmt.Errorf("%w: %w", transport.ErrDamaged, err)
		}
		g.asked()
		for a.more() {
			f, err := a.next()
			if err != nil {
				return err
			}
			if f.Type == wire.TypeRefuse {
				s.cfg.Log.Warn("pages refused", "lane", lane.ID().Kind, "reason", a.refusal)
			}
			if err := s.sendPaced(ctx, lane, f); err != nil {
				return err
			}
		}
	}
}

// Close gives the buffers back. All calls of Serve must have returned.
func (s *Server) Close() error { return s.pool.Close() }

// answer turns one request into frames, one buffer at a time.
type answer struct {
	reader  PageReader
	pool    *transport.Pool
	done    <-chan struct{}
	limit   *pace.Limiter
	want    wire.Want
	refusal error
	enc     *codec.Encoder

	pages  wire.Pages
	ranges []page.Range
	meta   []byte
}

// begin takes up the request encoded in meta.
func (a *answer) begin(meta []byte) error {
	a.refusal = nil
	return wire.ParseWant(meta, &a.want)
}

// more reports whether the request is not answered in full.
func (a *answer) more() bool { return len(a.want.Runs) > 0 }

// next is the next frame of the answer. Its Meta is valid until the next call.
func (a *answer) next() (transport.Frame, error) {
	space, room := a.want.Runs[0].Space, a.limit.MaxPayload(a.pool.BufferSize())>>page.Shift
	a.ranges = a.ranges[:0]
	n := 0
	for len(a.want.Runs) > 0 && n < room && a.want.Runs[0].Space == space {
		r := &a.want.Runs[0]
		k := min(int(r.Count), room-n)
		a.ranges = append(a.ranges, page.Range{Start: r.First.Addr(), End: (r.First + page.Num(k)).Addr()})
		n += k
		if r.First, r.Count = r.First+page.Num(k), r.Count-uint32(k); r.Count == 0 {
			a.want.Runs = a.want.Runs[1:]
		}
	}
	buf := a.pool.Get(n<<page.Shift, a.done)
	if buf == nil {
		return transport.Frame{}, transport.ErrClosed
	}
	if err := a.reader.ReadPages(space, a.ranges, buf.Bytes()); err != nil {
		buf.Release()
		a.want.Runs = nil
		a.refusal = err
		code := wire.RefuseRead
		if errors.Is(err, ErrGone) {
			code = wire.RefuseGone
		}
		a.meta = wire.AppendRefuse(a.meta[:0], wire.Refuse{ID: a.want.ID, Code: code, Text: err.Error()})
		return transport.Frame{Type: wire.TypeRefuse, Meta: a.meta}, nil
	}
	a.pages.ID = a.want.ID
	if space >= page.FirstFileSpace {
		a.enc.SetRound(codec.Round{}) // in a round, too, nobody could read there what these stood on
	}
	buf.SetLen(a.enc.Encode(&a.pages, space, a.ranges, buf.Bytes()))
	f := transport.Frame{Type: wire.TypePages, Payload: buf}
	if len(a.want.Runs) == 0 {
		f.Flags = wire.FlagLast
	}
	a.meta = wire.AppendPages(a.meta[:0], a.pages)
	f.Meta = a.meta
	if buf.Len() == 0 {
		buf.Release()
		f.Payload = nil
	}
	return f, nil
}
