package demo

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// Result of a demo.
type Result struct {
	OK          bool   `json:"ok"` // no acknowledged write lost, every key right
	Mode        string `json:"mode"`
	Size        uint64 `json:"bytes_data"`
	Hops        []Hop  `json:"hops"`
	Writes      uint64 `json:"writes"` // acknowledged
	Reads       uint64 `json:"reads"`  // and right
	KeysChecked int    `json:"keys_checked"`
}

// Hop is one migration, with what the clients saw of it.
type Hop struct {
	From   string           `json:"from"`
	To     string           `json:"to"`
	Gap    time.Duration    `json:"-"`
	GapMS  float64          `json:"client_downtime_ms"` // longest between two acknowledged writes of one client
	Writes uint64           `json:"client_writes"`
	Report appliance.Report `json:"report"`
}

// Print writes the table.
func (r *Result) Print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "hop\tmode\tmemory\ttotal\trounds\tbefore the switch\tclient downtime\tfreeze to running\tMiB/s\tfaults\tp50\tp99\tzero\ttwice\t")
	for _, h := range r.Hops {
		p := h.Report
		var before, pages uint64
		var took float64
		for i, x := range p.Rounds {
			if i < len(p.Rounds)-1 {
				before += x.Pages
			}
			pages += x.Pages
			took += x.MS
		}
		rate, share := "-", "-"
		if took > 0 {
			rate = fmt.Sprintf("%.0f", float64(pages)*4096/(1<<20)/(took/1000))
		}
		if pages > 0 {
			share = fmt.Sprintf("%.1f %%", 100*float64(before)/float64(pages))
		}
		fmt.Fprintf(tw, "%s to %s\t%s\t%d MiB\t%.2f s\t%d\t%s\t%.1f ms\t%.1f ms\t%s\t%d\t%.0f us\t%.0f us\t%d\t%d\t\n",
			h.From, h.To, p.Mode, p.BytesMemory>>20, p.TotalMS/1000, len(p.Rounds), share, h.GapMS, p.DowntimeMS,
			rate, p.Faults.Count, p.Faults.P50us, p.Faults.P99us, p.PagesZero, p.PagesResent)
	}
	_ = tw.Flush()
	if r.OK {
		fmt.Fprintf(w, "%d writes acknowledged and %d reads right; all %d keys of the clients and a sample of the rest verified: nothing lost.\n",
			r.Writes, r.Reads, r.KeysChecked)
	}
}
