package workload

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"github.com/dustin/go-humanize"
)

// Line is what is written each interval.
type Line struct {
	MS           int64  `json:"ms"`           // since the memory was filled
	Writes       uint64 `json:"writes_per_s"` // pages dirtied
	VerifiedRate uint64 `json:"verified_bytes_per_s"`
	GapUS        int64  `json:"gap_us"`   // the longest so far
	StallUS      int64  `json:"stall_us"` // the longest so far
	// RecentGapUS is the longest since the line before.
	RecentGapUS int64 `json:"recent_gap_us"`
}

// Outcome is what is written at the end.
type Outcome struct {
	Outcome       string `json:"outcome"` // "ok" or "bad ..."
	Writes        uint64 `json:"writes"`
	VerifiedBytes uint64 `json:"verified_bytes"`
	GapUS         int64  `json:"gap_us"`
	StallUS       int64  `json:"stall_us"`
}

// output writes lines. Errors are ignored: whoever reads may stay behind when
// the process moves.
type output struct {
	mu      sync.Mutex
	w       io.Writer
	json    bool
	unready bool
}

func newOutput(w io.Writer, asJSON bool) *output { return &output{w: w, json: asJSON, unready: true} }

func (o *output) print(v any, format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.json {
		b, err := json.Marshal(v)
		if err != nil {
			return
		}
		_, _ = fmt.Fprintf(o.w, "%s\n", b)
		return
	}
	_, _ = fmt.Fprintf(o.w, format+"\n", args...)
}

func (o *output) ready(cfg *Config, pid int, addr uint64) {
	o.unready = false
	o.print(map[string]any{"ready": true, "pid": pid, "addr": addr, "size": cfg.Size, "threads": cfg.Threads},
		"ready: pid %d, %s at %#x, threads %d, %s, %s at %s", pid, humanize.IBytes(cfg.Size), addr, cfg.Threads,
		cfg.Data, cfg.Pattern, (*rateFlag)(&cfg.Rate))
}

func (o *output) line(l Line) {
	o.print(l, "%7.1f s  %d writes/s  verified %s/s  longest gap %.1f ms, stall %.1f ms", float64(l.MS)/1e3,
		l.Writes, humanize.IBytes(l.VerifiedRate), float64(l.GapUS)/1e3, float64(l.StallUS)/1e3)
}

func (o *output) outcome(v Outcome) {
	o.print(v, "%s: %d writes, verified %s, longest gap %.1f ms, stall %.1f ms", v.Outcome, v.Writes,
		humanize.IBytes(v.VerifiedBytes), float64(v.GapUS)/1e3, float64(v.StallUS)/1e3)
}
