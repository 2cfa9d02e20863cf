package pager

import (
	"errors"
	"time"

	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
)

// keeperChanged is between pager and client only: Stats.Faults is the new
// keeper's pid.
const keeperChanged EventKind = 100

// tell sends an event to every client.
func (s *server) tell(e eventMsg) {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.send(packet{Op: opEvent}, e) // who is gone is found by its reader
	}
}

func (s *server) laneLost(id transport.LaneID, err error) {
	s.tell(eventMsg{Kind: LaneLost, Lane: id, Err: err.Error(), Code: codeOf(err), Stats: s.stats()})
	if s.fromFile.Load() && errors.Is(err, stream.ErrGone) {
		// Nobody watches a lazy restore that could decide.
		s.log.Error("what is missing is lost: its next touch is SIGBUS", "err", err)
		if err := s.trap.Poison(); err != nil {
			s.log.Error("poison", "err", err)
		}
	}
}

// progress tells how far it is, while that changes.
func (s *server) progress() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last, landed uint64
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		n, l := s.store.Missing(true), s.landed.Load()
		if r := s.landing.Load(); r != nil {
			l += r.pages.Load()
		}
		if n != last || l != landed {
			last, landed = n, l
			s.tell(eventMsg{Kind: Progress, Stats: s.stats()})
		}
	}
}

func (s *server) stats() Stats {
	st := s.store
	var total, eager int
	for _, src := range st.Sources() {
		total += src.Len()
		eager += src.EagerMissing()
	}
	total -= int(st.Count(pagestore.Kept))
	l := s.trap.Latency()
	landed := s.landed.Load()
	if r := s.landing.Load(); r != nil {
		landed += r.pages.Load()
	}
	return Stats{
		PagesTotal:    uint64(total),
		PagesResident: uint64(total) - min(st.Missing(false), uint64(total)),
		PagesZero:     st.Count(pagestore.Zeros),
		PagesDropped:  st.Count(pagestore.Dropped),
		PagesFaulted:  st.Count(pagestore.Faulted),
		PagesDouble:   st.Count(pagestore.Doubles),
		PagesOneSided: st.Count(pagestore.OneSided),
		PagesEager:    uint64(eager),
		PagesLanded:   landed,
		BytesWire:     s.fetch.Received(),
		FilesLost:     s.filesLost.Load(),
		Faults:        st.Count(pagestore.Faults),
		Forks:         st.Count(pagestore.Forks),
		Removes:       st.Count(pagestore.Removes),
		Remaps:        st.Count(pagestore.Remaps),
		Unmaps:        st.Count(pagestore.Unmaps),
		BadPages:      st.Count(pagestore.Bad),
		LanesLost:     st.Count(pagestore.Lanes),
		Lanes:         s.fetch.Lanes(),
		FaultP50:      l.P50,
		FaultP99:      l.P99,
		FaultMax:      l.Max,
		FaultMean:     l.Mean,
	}
}
