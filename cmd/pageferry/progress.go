package main

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/pageferry/pageferry/appliance"
)

// progress shows a migration while it runs.
type progress interface {
	update(appliance.Report)
	finish()
}

// newProgress is a bar where w is a terminal, lines elsewhere.
func newProgress(w io.Writer) progress {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &barProgress{w: w}
	}
	return &lineProgress{w: w, every: time.Second, now: time.Now}
}

// rate turns successive counts into a speed.
type rate struct {
	bytes uint64
	at    time.Time
	per   float64 // bytes per second
}

func (r *rate) update(bytes uint64, now time.Time) float64 {
	if d := now.Sub(r.at); r.at.IsZero() || bytes < r.bytes {
		r.bytes, r.at = bytes, now
	} else if d >= 200*time.Millisecond {
		r.per = float64(bytes-r.bytes) / d.Seconds()
		r.bytes, r.at = bytes, now
	}
	return r.per
}

func pagesLeft(r appliance.Report) uint64 {
	return r.PagesTotal - min(r.PagesTotal, r.PagesResident)
}

// lineProgress writes a line when the state changes, and one now and then.
type lineProgress struct {
	w     io.Writer
	every time.Duration
	now   func() time.Time
	state string
	round int
	last  time.Time
	kept  bool // and said so
	speed rate
}

// keptText says what a migration waits for that has brought every page.
func keptText(r appliance.Report) string {
	if !r.Kept || r.Finished() || r.State != "serving" && r.State != "running" || r.PagesTotal == 0 || pagesLeft(r) > 0 {
		return ""
	}
	where := "on " + r.Peer
	if r.Role == appliance.RoleDestination {
		where = "here"
	}
	return fmt.Sprintf("every page has arrived; the source's memory stays readable, and its copy there, until \"pageferry release %.12s\" %s", r.ID, where)
}

// roundText says where pre-copy is.
func roundText(r appliance.Report) string {
	text := fmt.Sprintf("round %d, %d pages left, %s/s", r.Round, r.PagesLeft, bytesText(r.WireRate))
	if r.DirtyRate > 0 {
		text += fmt.Sprintf(", dirtied %s/s", bytesText(r.DirtyRate))
	}
	if r.ExpectedMS > 0 {
		text += fmt.Sprintf(", downtime now %.0f ms", r.ExpectedMS)
	}
	if r.Throttle > 0 {
		text += fmt.Sprintf(", slowed by %.0f %%", 100*r.Throttle)
	}
	return text
}

func (p *lineProgress) update(r appliance.Report) {
	now := p.now()
	speed := p.speed.update(r.BytesWire, now)
	if r.Finished() || (r.State == p.state && r.Round == p.round && now.Sub(p.last) < p.every) {
		return
	}
	p.state, p.round, p.last = r.State, r.Round, now
	if r.Round > 0 && r.State == "tracking" {
		fmt.Fprintf(p.w, "%-10s %s\n", r.State, roundText(r))
		return
	}
	if r.PagesTotal == 0 {
		fmt.Fprintf(p.w, "%-10s %s (pid %d) to %s%s\n", r.State, r.Comm, r.SourcePID, r.Peer, atMost(r))
		return
	}
	if text := keptText(r); text != "" {
		if !p.kept {
			fmt.Fprintf(p.w, "%-10s %s\n", r.State, text)
		}
		p.kept = true
		return
	}
	fmt.Fprintf(p.w, "%-10s %d of %d pages left, %s/s%s\n", r.State, pagesLeft(r), r.PagesTotal, bytesText(speed), atMost(r))
}

func (p *lineProgress) finish() {}

// barProgress is one bar of pages. mpb draws it from a goroutine of its own,
// which reads what update last stored.
type barProgress struct {
	w     io.Writer
	group *mpb.Progress
	bar   *mpb.Bar
	text  atomic.Pointer[string]
	speed rate
}

func (p *barProgress) update(r appliance.Report) {
	text := fmt.Sprintf("%s (pid %d) %s ", r.Comm, r.SourcePID, r.State)
	if r.Round > 0 && r.State == "tracking" {
		text += roundText(r) + " "
	} else if speed := p.speed.update(r.BytesWire, time.Now()); speed > 0 {
		text += bytesText(speed) + "/s "
	}
	if kept := keptText(r); kept != "" {
		text = kept + " "
	}
	if r.MaxBandwidth != 0 {
		text += "of " + r.MaxBandwidth.String() + " "
	}
	p.text.Store(&text)
	if p.group == nil {
		p.group = mpb.New(mpb.WithOutput(p.w), mpb.WithWidth(80), mpb.WithRefreshRate(100*time.Millisecond))
		p.bar = p.group.AddBar(0, mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(decor.Any(func(decor.Statistics) string { return *p.text.Load() })),
			mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
				if s.Total == 0 {
					return ""
				}
				return fmt.Sprintf("%d pages left", max(0, s.Total-s.Current))
			})))
	}
	if r.PagesTotal > 0 {
		p.bar.SetTotal(int64(r.PagesTotal), false)
		p.bar.SetCurrent(int64(r.PagesTotal - pagesLeft(r)))
	}
}

func (p *barProgress) finish() {
	if p.group == nil {
		return
	}
	p.bar.Abort(true)
	p.group.Wait()
}

// atMost is how its limit goes behind what a migration does.
func atMost(r appliance.Report) string {
	if r.MaxBandwidth == 0 {
		return ""
	}
	return ", at most " + r.MaxBandwidth.Text()
}

func bytesText(n float64) string {
	for _, u := range []struct {
		name string
		size float64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", n/u.size, u.name)
		}
	}
	return fmt.Sprintf("%.0f B", n)
}
