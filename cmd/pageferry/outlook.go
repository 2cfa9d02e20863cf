package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

// printOutlook is a table of what each mode would cost, and where that comes from.
func printOutlook(w io.Writer, o *appliance.Outlook) {
	if o == nil {
		return
	}
	fmt.Fprintln(w)
	if m := o.Measured; m != nil {
		var parts []string
		for _, p := range m.Dirty {
			parts = append(parts, fmt.Sprintf("%s in %s", bytesText(float64(p.Bytes)), msText(p.MS)))
		}
		fmt.Fprintf(w, "writes: %s (measured by %s)\n", strings.Join(parts, ", "), m.Tracker)
	}
	if l := o.Link; l != nil {
		fmt.Fprintf(w, "link: %s/s of pages, %s\n", bytesText(l.BytesPerSecond), l.From)
	}
	if o.Unmeasured != "" {
		fmt.Fprintf(w, "not measured: %s\n", o.Unmeasured)
	}
	if len(o.Predictions) == 0 {
		fmt.Fprintln(w, "What it would cost cannot be predicted.")
		return
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "MODE\tTOTAL\tDOWNTIME\tSENT\tTWICE\tROUNDS\tCONVERGES\tBECAUSE")
	for i := range o.Predictions {
		p := &o.Predictions[i]
		converges := "-"
		if p.Mode.Rounds() {
			converges = map[bool]string{true: "yes", false: "no"}[p.Converges]
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", p.Mode, msText(p.TotalMS), msText(p.DowntimeMS),
			bytesText(float64(p.BytesSent)), bytesText(float64(p.BytesResent)), p.Rounds, converges, p.Reason)
	}
	_ = tw.Flush()
	if o.Auto != "" {
		fmt.Fprintf(w, "auto would choose %s: %s\n", o.Auto, o.AutoReason)
	}
}

func msText(ms float64) string {
	if ms >= 10000 {
		return fmt.Sprintf("%.1f s", ms/1000)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// predictedText holds what was expected against what happened.
func predictedText(p *migrate.Predicted, r *appliance.Report) string {
	type pair struct{ said, was string }
	total := pair{msText(p.TotalMS), msText(r.TotalMS)}
	down := pair{msText(p.DowntimeMS), msText(r.DowntimeMS)}
	wire := pair{bytesText(float64(p.BytesWire)), bytesText(float64(r.BytesWire))}
	text := fmt.Sprintf("total %s, downtime %s, wire %s, %d rounds", total.said, down.said, wire.said, p.Rounds)
	if r.Outcome != appliance.OutcomeDone {
		return text
	}
	return text + fmt.Sprintf("; it was %s, %s, %s, %d", total.was, down.was, wire.was, len(r.Rounds))
}
