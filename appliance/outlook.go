package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
)

// Outlook is what the model says of each mode for one process on one link, and
// what it was made from.
type Outlook struct {
	Measured *Measurement `json:"measured,omitempty"` // nil: the process was not looked at
	Link     *Link        `json:"link,omitempty"`     // nil: its rate is not known, and nothing predicted
	// Predictions are of stop, precopy, postcopy and hybrid; without a measurement of
	// stop and postcopy alone.
	Predictions []migrate.Predicted `json:"predictions"`
	// Auto is what --mode auto would choose, and AutoReason why.
	Auto       migrate.Mode `json:"auto,omitempty"`
	AutoReason string       `json:"auto_reason,omitempty"`
	// Unmeasured is why something of this is missing.
	Unmeasured string `json:"unmeasured,omitempty"`
}

// Measurement is what a few looks at the running process told.
type Measurement struct {
	Tracker     string       `json:"tracker"`
	BytesMemory uint64       `json:"bytes_memory"` // of pages with content, as far as they are tracked
	MS          float64      `json:"ms"`           // how long it took
	Dirty       []DirtyPoint `json:"dirty"`
}

// DirtyPoint says that so many bytes, each page counted once, were written within
// an interval.
type DirtyPoint struct {
	MS    float64 `json:"ms"`
	Bytes uint64  `json:"bytes"`
}

// Link is how fast pages get to the destination.
type Link struct {
	BytesPerSecond float64 `json:"bytes_per_second"` // of pages
	WireShare      float64 `json:"wire_share"`       // bytes on the wire for each of pages
	From           string  `json:"from"`             // where the figure comes from
}

// newOutlook lets the model look ahead. m.Curve may be unknown: then what needs
// rounds is left out.
func newOutlook(m migrate.Measured, link *Link, opts SourceOptions) (*Outlook, error) {
	o := &Outlook{Link: link, Predictions: []migrate.Predicted{}}
	if m.Tracker != "" {
		o.Measured = &Measurement{Tracker: m.Tracker, BytesMemory: m.Content, MS: ms(m.Took), Dirty: []DirtyPoint{}}
		for _, p := range m.Curve.Points() {
			o.Measured.Dirty = append(o.Measured.Dirty, DirtyPoint{ms(p.Interval), p.Bytes})
		}
	}
	if link == nil {
		return o, nil
	}
	in := m.Inputs(opts.MaxDowntime, opts.Throttle)
	in.WireRate = link.BytesPerSecond
	all, err := plan.Predict(in)
	if err != nil {
		return nil, err
	}
	for _, p := range all.All() {
		if o.Measured == nil && migrate.Mode(p.Mode).Rounds() {
			continue
		}
		x := migrate.NewPredicted(&p, link.WireShare)
		switch p.Mode {
		case plan.ModeStop:
			x.Reason = "every page while the program stands still"
		case plan.ModePostCopy:
			x.Reason = "every page after the switch"
			if p.Stalled > 0 {
				x.Reason += fmt.Sprintf(": its threads wait for pages for %.0f ms in all", x.StalledMS)
			}
		}
		o.Predictions = append(o.Predictions, x)
	}
	if o.Measured == nil {
		o.Auto, o.AutoReason = migrate.ModePostCopy, "what it writes cannot be tracked"
		return o, nil
	}
	mode, why, err := plan.Choose(in, opts.MaxDowntime)
	if mode == plan.ModeStop {
		mode = plan.ModeHybrid // as migrate has it
	}
	o.Auto, o.AutoReason = migrate.Mode(mode), why
	return o, err
}

// Measure looks at a running process, and says what a migration over a link of that
// many bytes per second would cost. The process stands still for some milliseconds
// once; nothing is left in it.
func Measure(ctx context.Context, e Engine, pid int, link Bandwidth) (o *Outlook, err error) {
	// Connections end only where it really moves.
	opts := SourceOptions{TCP: "close"}
	p, offer, err := e.NewSourceProcess(pid, opts)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	m, err := migrate.Measure(ctx, p, offer)
	if err != nil {
		return nil, err
	}
	return newOutlook(m, &Link{BytesPerSecond: float64(link) / frameShare, WireShare: frameShare, From: "as given"}, opts)
}

// frameShare is what a page that does not shrink takes on a link of Ethernet with an
// MTU of 1500, headers of all layers included (transport/pace).
const frameShare = 1.046

// remembered is how fast the last migration to a peer was that can tell.
func remembered(rs []Report, peer string, limit Bandwidth) *Link {
	for i := len(rs) - 1; i >= 0; i-- {
		r := &rs[i]
		if r.Role != RoleSource || r.Outcome != OutcomeDone || r.MaxBandwidth != limit {
			continue
		}
		if to, err := peerAddress(r.Peer); err != nil || to != peer {
			continue
		}
		if l := pagesRate(r); l != nil {
			l.From = fmt.Sprintf("of migration %.8s to the same destination", r.ID)
			return l
		}
	}
	return nil
}

// pagesRate is the rate of the largest round of a migration. What comes after
// the freeze counts where there were no other rounds: else its pages are not known.
func pagesRate(r *Report) *Link {
	const leastPages, leastMS = 2048, 30
	var best *Round
	for i := range r.Rounds {
		x := &r.Rounds[i]
		if i == len(r.Rounds)-1 && i > 0 {
			break
		}
		if x.Pages >= leastPages && x.MS >= leastMS && (best == nil || x.Pages > best.Pages) {
			best = x
		}
	}
	if best == nil {
		return nil
	}
	bytes := float64(best.Pages << page.Shift)
	return &Link{BytesPerSecond: bytes / best.MS * 1000, WireShare: float64(best.BytesWire) / bytes}
}

// foresee is what is expected of a mode without rounds, which begins with no look
// at the process; nil where nothing is known of the link. Rounds measure by
// themselves.
func (d *Daemon) foresee(opts SourceOptions, to string, o migrate.Offer) *migrate.Predicted {
	if opts.Mode.Rounds() {
		return nil
	}
	link := remembered(d.registry.list(), to, opts.MaxBandwidth)
	if link == nil {
		return nil
	}
	out, err := newOutlook(migrate.Measured{Content: o.MemoryBytes, Threads: o.Threads}, link, opts)
	if err != nil {
		return nil
	}
	for i := range out.Predictions {
		if p := &out.Predictions[i]; p.Mode == opts.Mode {
			p.Reason = "link: " + link.From
			return p
		}
	}
	return nil
}

// DryRun inspects the process, asks the destination, and predicts what each mode
// would cost. Where it would be taken, the process stands still for some
// milliseconds, and a sample of its pages crosses the link, which the destination
// throws away.
func (d *Daemon) DryRun(ctx context.Context, req MigrateRequest) (DryRunReport, error) {
	opts, err := d.options(req)
	if err != nil {
		return DryRunReport{}, err
	}
	to, err := peerAddress(req.To)
	if err != nil {
		return DryRunReport{}, &UsageError{Msg: err.Error()}
	}
	in, err := d.engine.Inspect(req.PID, opts)
	if err != nil {
		return DryRunReport{}, fmt.Errorf("process %d: %w", req.PID, err)
	}
	rep := DryRunReport{Inspection: in, Destination: req.To, Reasons: []string{}}
	if !in.Movable {
		return rep, nil
	}
	if opts.Migration, err = newMigrationID(); err != nil {
		return DryRunReport{}, err
	}
	p, offer, err := d.hold(req.PID, opts)
	if err != nil {
		return DryRunReport{}, err
	}
	reh, err := d.links.rehearse(ctx, to, p, offer, opts)
	err = errors.Join(err, p.Close())
	var refusal *migrate.Refusal
	if err != nil && !errors.As(err, &refusal) {
		return DryRunReport{}, fmt.Errorf("destination %s: %w", req.To, err)
	}
	rep.Destination = cmp.Or(reh.Hello.Host, req.To)
	if refusal != nil {
		rep.Reasons = append(rep.Reasons, refusal.Reasons...)
		return rep, nil
	}
	m := reh.Measured
	if m.Tracker == "" {
		m.Content, m.Threads = offer.MemoryBytes, offer.Threads
	}
	link := &Link{m.Rate, m.Share, fmt.Sprintf("measured with %s of its pages", mib(m.Sampled))}
	if m.Rate == 0 {
		link = remembered(d.registry.list(), to, opts.MaxBandwidth)
	}
	if rep.Outlook, err = newOutlook(m, link, opts); err != nil {
		return DryRunReport{}, err
	}
	if reh.Failed != nil {
		rep.Unmeasured = reh.Failed.Error()
	}
	return rep, nil
}

// rehearse asks a destination and measures.
func (h *handover) rehearse(ctx context.Context, to string, p migrate.Process, o migrate.Offer, opts SourceOptions) (migrate.Rehearsal, error) {
	ctx, stop := context.WithTimeout(ctx, rehearsalLimit)
	defer stop()
	lo, err := h.laneOptions(opts.Migration, to, opts)
	if err != nil {
		return migrate.Rehearsal{}, err
	}
	lanes, err := h.d.engine.NewLanes(lo)
	if err != nil {
		return migrate.Rehearsal{}, err
	}
	cfg := h.config(opts.Migration, to, p, o)
	cfg.Lanes, cfg.KillPoint = lanes, nil
	reh, err := migrate.Rehearse(ctx, cfg)
	return reh, errors.Join(err, lanes.Close())
}

// rehearsalLimit bounds a dry run: over a link on which 1 MiB takes longer nothing
// is to be predicted.
const rehearsalLimit = time.Minute
