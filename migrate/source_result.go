package migrate

import "time"

// result puts the figures together.
func (s *Source) result(o Outcome, cause error) (Result, error) {
	r, t := s.res, s.times
	now := time.Now()
	r.ID, r.IDText = s.cfg.ID, s.cfg.ID.String()
	r.Mode, r.SourcePID, r.DestPID = s.rec.Mode, s.rec.SourcePID, s.rec.DestPID
	r.State = s.State()
	r.StateText = r.State.String()
	r.Outcome = o
	if cause != nil {
		r.Reason = cause.Error()
	}
	r.Unsettled = s.unsettled()
	r.TotalMS = ms(t.start, now)
	r.FreezeMS, r.SendMS = ms(t.freeze, t.frozen), ms(t.frozen, t.sent)
	r.HoldMS, r.CommitMS = ms(t.ready, t.held), ms(t.held, t.committed)
	r.DowntimeMS, r.SwitchMS = ms(t.freeze, t.running), ms(t.ready, t.running)
	r.ResidentMS = ms(t.freeze, t.resident)

	p := s.Progress()
	st := p.ArrivalStats
	r.BytesMemory = p.BytesMemory
	r.Saved = s.cfg.Lanes.Saved()
	r.BytesWire = max(s.cfg.Lanes.BytesSent(), st.BytesWire)
	r.PagesResident, r.PagesZero = st.PagesResident, st.PagesZero
	r.PagesFaulted, r.PagesResent, r.PagesOneSided = st.PagesFaulted, st.PagesDouble, st.PagesOneSided
	r.PagesSent = st.PagesResident - min(st.PagesZero, st.PagesResident) + st.PagesDouble
	last := s.lastRound(&r, st)
	r.Faults = Faults{Count: st.PagesFaulted, P50us: st.FaultP50us, P99us: st.FaultP99us, MaxUS: st.FaultMaxus}
	if r.Rounds == nil {
		r.Rounds = []Round{}
	}
	if !t.freeze.IsZero() {
		r.Rounds = append(r.Rounds, last)
	}
	return r, cause
}

// lastRound is what came after the freeze. It adds what the rounds before it brought
// to the counts of pages.
func (s *Source) lastRound(r *Result, st ArrivalStats) Round {
	last := Round{Round: len(r.Rounds) + 1, Pages: st.PagesTotal, PagesZero: st.PagesZero, BytesWire: r.BytesWire, MS: r.ResidentMS}
	if len(r.Rounds) == 0 {
		if st.PagesTotal != 0 {
			r.PagesTotal = st.PagesTotal
		}
		return last
	}
	all := st.PagesTotal
	for _, b := range r.Rounds {
		last.BytesWire -= min(last.BytesWire, b.BytesWire)
		all += b.Pages
		r.PagesSent += b.Pages - b.PagesZero
		r.PagesZero += b.PagesZero
	}
	// Pages that the program gave up meanwhile were sent for nothing: they count as
	// sent again.
	r.PagesResent += all - min(all, r.PagesTotal)
	r.PagesResident += r.PagesTotal - min(r.PagesTotal, st.PagesTotal)
	return last
}
