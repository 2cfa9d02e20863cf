package migrate

import (
	"context"
	"errors"
	"time"

	"github.com/pageferry/pageferry/plan"
)

// Predicted is what the model said of a mode.
type Predicted struct {
	Mode       Mode    `json:"mode"`
	TotalMS    float64 `json:"total_ms"`    // until the last page is there
	DowntimeMS float64 `json:"downtime_ms"` // at the switch
	// BytesSent are bytes of pages, of which BytesResent are sent more than once;
	// BytesWire is what they take on the wire, by what a sample took.
	BytesSent   uint64 `json:"bytes_sent"`
	BytesResent uint64 `json:"bytes_resent"`
	BytesWire   uint64 `json:"bytes_wire"`
	Rounds      int    `json:"rounds"` // the one after the freeze included
	// Converges reports whether all would be there within the allowed downtime.
	Converges bool    `json:"converges"`
	Throttle  float64 `json:"throttle,omitempty"`
	// StalledMS is how long threads wait for pages after the switch, in all.
	StalledMS float64 `json:"stalled_ms,omitempty"`
	Reason    string  `json:"reason,omitempty"`
}

// NewPredicted takes over what the model said; share is that of a Measured.
func NewPredicted(p *plan.Prediction, share float64) Predicted {
	f := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	if share == 0 {
		share = 1
	}
	return Predicted{Mode: Mode(p.Mode), TotalMS: f(p.Total), DowntimeMS: f(p.Downtime),
		BytesSent: p.Sent, BytesResent: p.Resent, BytesWire: uint64(float64(p.Sent) * share),
		Rounds: p.Rounds + 1, Converges: p.Converges, Throttle: p.Throttle, StalledMS: f(p.Stalled), Reason: p.Reason}
}

// choose says whether there are to be rounds, and notes what is expected.
func (r *rounds) choose(m *Measured) (rounds bool, err error) {
	s := r.s
	mode := plan.Mode(s.rec.Mode)
	if m.Rate == 0 {
		if s.cfg.Auto {
			s.chose(ModeHybrid, "there is too little to measure the link with")
		}
		return true, nil
	}
	in := m.Inputs(s.cfg.MaxDowntime, s.cfg.Throttle)
	if s.cfg.Auto {
		var why string
		if mode, why, err = plan.Choose(in, s.cfg.MaxDowntime); err != nil {
			return false, err
		}
		if mode == plan.ModeStop { // hybrid without rounds costs no more, and the program runs sooner
			mode = plan.ModeHybrid
		}
		s.chose(Mode(mode), why)
	}
	all, err := plan.Predict(in)
	if err != nil {
		return false, err
	}
	for _, p := range all.All() {
		if p.Mode == mode {
			x := NewPredicted(&p, m.Share)
			s.res.Predicted = &x
			s.log.Info("predicted", "mode", p.Mode, "total", p.Total, "downtime", p.Downtime, "bytes", p.Sent, "rounds", p.Rounds,
				"converges", p.Converges, "wire_rate", m.Rate, "reason", p.Reason)
		}
	}
	return mode != plan.ModePostCopy, nil
}

func (s *Source) chose(mode Mode, why string) {
	s.res.Chosen, s.res.ChosenWhy = mode, why
	s.log.Info("mode", "chosen", mode, "reason", why)
	if mode == ModePostCopy {
		s.res.Switch = "no rounds: " + why
	}
}

// untracked is what follows from a process that cannot be tracked: with Auto its
// pages come after the switch.
func (s *Source) untracked(ctx context.Context, err error) error {
	if !s.cfg.Auto || ctx.Err() != nil || errors.Is(err, ErrGone) {
		return err
	}
	s.chose(ModePostCopy, "what it writes cannot be tracked: "+err.Error())
	return nil
}

// withSample is the first round with what was sent before it to measure the link.
func (r *rounds) withSample(x Round) Round {
	x.Pages += r.sample.Pages
	x.PagesZero += r.sample.PagesZero
	x.BytesWire += r.sample.BytesWire
	x.MS += r.sample.MS
	r.sample = Round{}
	return x
}

// noteSample makes a round of the sample where none came after it.
func (r *rounds) noteSample() {
	if r.sample.Pages > 0 {
		r.s.res.Rounds = append(r.s.res.Rounds, r.withSample(Round{Round: 1, DirtyPages: r.last.DirtyPages}))
	}
}
