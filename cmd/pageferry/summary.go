package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/pageferry/pageferry/appliance"
)

// printSummary says in words how a migration went.
func printSummary(w io.Writer, r appliance.Report) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(tw, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("migration", "%s (%s)", r.ID, r.Role)
	row("process", "%d %s, %s", r.SourcePID, r.Comm, bytesText(float64(r.BytesMemory)))
	row("peer", "%s", r.Peer)
	row("mode", "%s, trap %s, transport %s", r.Mode, r.Trap, r.Transport)
	state := r.State
	if r.Outcome != "" {
		state = string(r.Outcome)
	}
	row("state", "%s", state)
	if r.Reason != "" {
		row("reason", "%s", r.Reason)
	}
	if r.DestPID != 0 {
		row("new pid", "%d", r.DestPID)
	}
	if r.DowntimeMS > 0 {
		row("downtime", "%.1f ms (switch %.1f ms)", r.DowntimeMS, r.SwitchMS)
	}
	if r.ResidentMS > 0 {
		row("resident", "%.0f ms after the freeze", r.ResidentMS)
	}
	if r.TotalMS > 0 {
		row("total", "%.0f ms", r.TotalMS)
	}
	for _, x := range r.Rounds {
		if len(r.Rounds) > 1 {
			row(fmt.Sprintf("round %d", x.Round), "%d pages, %s in %.0f ms, %d written meanwhile", x.Pages, bytesText(float64(x.BytesWire)), x.MS, x.DirtyPages)
		}
	}
	if r.SwitchReason != "" {
		row("then", "%s", r.SwitchReason)
	}
	if s := r.Saved; s.LZ4.Pages+s.Delta.Pages+s.Same.Pages > 0 {
		row("compressed", "%d pages to %s, %d as what had changed (%s), %d equal to others", s.LZ4.Pages, bytesText(float64(s.LZ4.Bytes)),
			s.Delta.Pages, bytesText(float64(s.Delta.Bytes)), s.Same.Pages)
	}
	if r.PagesTotal > 0 {
		row("pages", "%d, of which %d zero, %d by fault, %d twice", r.PagesTotal, r.PagesZero, r.PagesFaulted, r.PagesDouble)
		if r.PagesOneSided > 0 {
			row("one-sided", "%d pages were read from the process's own memory", r.PagesOneSided)
		}
		row("wire", "%s", bytesText(float64(r.BytesWire)))
	}
	if text := keptText(r); text != "" {
		row("kept", "%s", text)
	}
	if r.MaxBandwidth != 0 {
		row("limit", "%s", r.MaxBandwidth.Text())
	}
	if r.Faults.Count > 0 {
		row("faults", "%d, p50 %.0f us, p99 %.0f us, longest %.0f us", r.Faults.Count, r.Faults.P50us, r.Faults.P99us, r.Faults.MaxUS)
	}
	if p := r.Predicted; p != nil {
		row("predicted", "%s", predictedText(p, &r))
	}
	for _, rem := range r.Remarks {
		row("remark", "%s", rem)
	}
	_ = tw.Flush()
}

// printInspection lists what a process is made of, refused things last so that
// they are seen.
func printInspection(w io.Writer, in appliance.Inspection) {
	fmt.Fprintf(w, "%d %s (%s): %d threads, %s\n", in.PID, in.Comm, in.Exe, in.Threads, bytesText(float64(in.MemoryBytes)))
	if in.Parent != "" || in.Unit != "" {
		fmt.Fprintf(w, "parent %s", in.Parent)
		if in.Unit != "" {
			fmt.Fprintf(w, ", unit %s", in.Unit)
		}
		if in.Restarts {
			fmt.Fprint(w, ", which starts another when this one ends: see --on-source-exit")
		}
		fmt.Fprintln(w)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, carried := range []bool{true, false} {
		for _, it := range in.Items {
			if it.Carried != carried {
				continue
			}
			verdict := "carried"
			if !carried {
				verdict = "REFUSED"
			}
			fmt.Fprintln(tw, strings.TrimRight(fmt.Sprintf("%s\t%s\t%s\t%s", verdict, it.Kind, it.What, it.Reason), "\t"))
		}
	}
	_ = tw.Flush()
	if in.Movable {
		fmt.Fprintln(w, "It can move.")
	} else {
		fmt.Fprintln(w, "It cannot move.")
	}
}
