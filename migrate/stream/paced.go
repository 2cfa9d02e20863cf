package stream

import (
	"context"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// wired is what a lane may also be: it knows what bytes become on the network,
// with the headers of records and packets. For others bytes stay what they are.
type wired interface{ OnWire(bytes int) int }

// sendPaced sends f when it is its turn by s.cfg.Limiter.
func (s *Server) sendPaced(ctx context.Context, lane transport.Lane, f transport.Frame) error {
	if l := s.cfg.Limiter; l != nil {
		n := wire.HeaderSize + len(f.Meta)
		if f.Payload != nil {
			n += f.Payload.Len()
		}
		if w, ok := lane.(wired); ok {
			n = w.OnWire(n)
		}
		wait := l.Wait
		if lane.ID().Kind == transport.Urgent {
			wait = l.Urgent
		}
		if err := wait(ctx, n); err != nil {
			f.Payload.Release()
			return err
		}
	}
	return lane.Send(f)
}
