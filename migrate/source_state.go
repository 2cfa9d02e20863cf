package migrate

import (
	"context"
	"fmt"
	"time"
)

// sendState sends image and memory map, the map as it becomes known.
// before is what rounds did, nil where there were none.
func (s *Source) sendState(ctx context.Context, c *control, st State, before *rounds) error {
	s.res.BytesImage = uint64(len(st.Image))
	if err := s.sendMemory(c, stateMsg{}, st.Memory, st.Image); err != nil {
		return err
	}
	var rest []Memory
	if st.Rest != nil {
		err := s.engine("scan", func() (err error) { rest, err = st.Rest(ctx); return err })
		if err != nil {
			return err
		}
	}
	if before != nil {
		rest = before.dirty(rest)
	}
	if err := s.sendMemory(c, memoryMsg{}, rest); err != nil {
		return err
	}
	s.times.sent = time.Now()
	return nil
}

// sendMemory sends m with blobs and a memory map as the last of them.
func (s *Source) sendMemory(c *control, m message, mem []Memory, blobs ...[]byte) error {
	b, err := encodeMemory(mem)
	if err != nil {
		return err
	}
	for i := range mem {
		s.res.PagesTotal += mem[i].Lazy.Pages() + mem[i].Eager.Pages()
	}
	return s.send(c, m, append(blobs, b)...)
}

// awaitReady waits for the destination to have rebuilt, as long as it gets on.
func (s *Source) awaitReady(ctx context.Context, c *control) error {
	var last uint64
	for {
		one, stop := context.WithTimeoutCause(ctx, s.t.Ready, fmt.Errorf("%w: nothing rebuilt in %v", ErrStalled, s.t.Ready))
		for {
			r, err := s.recv(one, c)
			if err != nil {
				stop()
				return err
			}
			if m, ok := r.msg.(*progressMsg); ok {
				if m.Stats.PagesResident == last {
					continue
				}
				last = m.Stats.PagesResident
				break
			}
			stop()
			switch m := r.msg.(type) {
			case *readyMsg:
				s.times.ready = r.at
				s.res.RebuildMS = micros(m.RebuildMicros)
				s.note(m.Stats.arrival())
				return nil
			case *abortedMsg:
				return fmt.Errorf("%w: %s", errGivenUp, m.Reason)
			}
			return unexpected(r.msg, "ready")
		}
		stop()
	}
}
