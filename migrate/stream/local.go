package stream

import (
	"fmt"
	"slices"
	"sync"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// NewLocalLane returns a lane with a server behind it, without a wire between:
// for pages that come from a file on this host. Payloads come from pool.
func NewLocalLane(id transport.LaneID, reader PageReader, pool *transport.Pool) transport.Lane {
	l := &localLane{id: id, done: make(chan struct{}), wants: make(chan []byte, maxWants)}
	l.answer = answer{reader: reader, pool: pool, done: l.done, enc: codec.NewEncoder(codec.EncoderConfig{})}
	return l
}

// maxWants is more requests than windows have room for, in the background and of
// reads: a lane's own receiver sends some of them, and must not wait for itself.
const maxWants = 256

type localLane struct {
	id     transport.LaneID
	wants  chan []byte
	done   chan struct{}
	once   sync.Once
	answer answer // Recv's own

	mu    sync.Mutex
	stats transport.Stats
}

func (l *localLane) ID() transport.LaneID { return l.id }

func (l *localLane) Send(frames ...transport.Frame) error {
	for _, f := range frames {
		f.Payload.Release()
		if f.Type != wire.TypeWant {
			return fmt.Errorf("%w: %v on a lane from a file", transport.ErrDamaged, f.Type)
		}
		select {
		case l.wants <- slices.Clone(f.Meta):
		case <-l.done:
			return transport.ErrClosed
		}
	}
	return nil
}

func (l *localLane) Recv() (transport.Frame, error) {
	for !l.answer.more() {
		select {
		case w := <-l.wants:
			if err := l.answer.begin(w); err != nil {
				return transport.Frame{}, fmt.Errorf("%w: %w", transport.ErrDamaged, err)
			}
		case <-l.done:
			return transport.Frame{}, transport.ErrClosed
		}
	}
	f, err := l.answer.next()
	if err != nil {
		return f, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.FramesReceived++
	l.stats.BytesReceived += uint64(len(f.Meta))
	if f.Payload != nil {
		l.stats.BytesReceived += uint64(f.Payload.Len())
	}
	return f, nil
}

func (l *localLane) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *localLane) Stats() transport.Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}
