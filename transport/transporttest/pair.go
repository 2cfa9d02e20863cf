package transporttest

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
)

// pipeSize is how many bytes a direction of an in-memory pair holds before its
// writer blocks: about what a bulk lane's socket does.
const pipeSize = 256 << 10

// NewPair returns two connected lanes that share an identity. Payloads are
// received into the pool of the end that receives; a pool may be nil where none
// is expected. Whoever closes one end makes the other see transport.ErrPeer,
// after it has received what was sent before.
func NewPair(id transport.LaneID, poolA, poolB *transport.Pool) (a, b *framed.Lane) {
	ab, ba := newPipe(), newPipe()
	a = framed.New(id, &memStream{in: ba, out: ab}, poolA)
	b = framed.New(id, &memStream{in: ab, out: ba}, poolB)
	return a, b
}

// pipe is one direction: a ring of bytes.
type pipe struct {
	mu         sync.Mutex
	cond       *sync.Cond
	ring       []byte
	r, n       int
	noMore     bool // the writer is gone: read what there is, then EOF
	readerGone bool
}

func newPipe() *pipe {
	p := &pipe{ring: make([]byte, pipeSize)}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.n == 0 && !p.noMore && !p.readerGone {
		p.cond.Wait()
	}
	if p.readerGone {
		return 0, transport.ErrClosed
	}
	if p.n == 0 {
		return 0, io.EOF
	}
	total := 0
	for len(b) > 0 && p.n > 0 {
		k := copy(b, p.ring[p.r:min(p.r+p.n, len(p.ring))])
		p.r, p.n = (p.r+k)%len(p.ring), p.n-k
		b = b[k:]
		total += k
	}
	p.cond.Broadcast()
	return total, nil
}

func (p *pipe) write(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(b) > 0 {
		for p.n == len(p.ring) && !p.noMore && !p.readerGone {
			p.cond.Wait()
		}
		if p.noMore {
			return transport.ErrClosed
		}
		if p.readerGone {
			return fmt.Errorf("%w: closed by the peer", transport.ErrPeer)
		}
		w := (p.r + p.n) % len(p.ring)
		k := copy(p.ring[w:min(w+len(p.ring)-p.n, len(p.ring))], b)
		p.n += k
		b = b[k:]
		p.cond.Broadcast()
	}
	return nil
}

func (p *pipe) end(reader bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if reader {
		p.readerGone = true
	} else {
		p.noMore = true
	}
	p.cond.Broadcast()
}

// memStream is one end of two pipes; see framed.Stream.
type memStream struct {
	in, out        *pipe
	sent, received atomic.Uint64
}

func (s *memStream) Read(p []byte) (int, error) {
	n, err := s.in.read(p)
	s.received.Add(uint64(n))
	return n, err
}

func (s *memStream) ReadFull(p []byte) error {
	for len(p) > 0 {
		n, err := s.Read(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (s *memStream) Write(bufs [][]byte) error {
	for _, b := range bufs {
		if err := s.out.write(b); err != nil {
			return err
		}
		s.sent.Add(uint64(len(b)))
	}
	return nil
}

func (s *memStream) Close() error {
	s.in.end(true)
	s.out.end(false)
	return nil
}

func (s *memStream) Counters() (sent, received uint64) { return s.sent.Load(), s.received.Load() }
