package bench

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"text/tabwriter"
)

// Row is one figure that has a target.
type Row struct {
	What   string
	Target float64
	Got    float64
	Unit   string
	// AtLeast: more is better; otherwise the target is the most.
	AtLeast bool
	// Of is what the figure is made of where it is a ratio.
	Of string
	// Remark stands behind the verdict.
	Remark string
}

// Met reports whether the target was reached.
func (r *Row) Met() bool {
	if r.AtLeast {
		return r.Got >= r.Target
	}
	return r.Got <= r.Target
}

// Ratio is above 1 where the figure is better than its target.
func (r *Row) Ratio() float64 {
	better, worse := r.Target, r.Got
	if r.AtLeast {
		better, worse = r.Got, r.Target
	}
	if worse == 0 {
		return 0
	}
	return better / worse
}

// Table collects rows. Safe for concurrent use; the zero value is empty.
type Table struct {
	mu   sync.Mutex
	rows []Row
}

// Add appends a row; a row of the same What replaces the earlier one.
func (t *Table) Add(r Row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.rows {
		if t.rows[i].What == r.What {
			t.rows[i] = r
			return
		}
	}
	t.rows = append(t.rows, r)
}

// Rows is a copy.
func (t *Table) Rows() []Row {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]Row(nil), t.rows...)
}

// Print writes the rows with their verdicts.
func (t *Table) Print(w io.Writer) {
	rows := t.Rows()
	if len(rows) == 0 {
		return
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "figure\ttarget\tmeasured\tratio\tverdict")
	met := 0
	for _, r := range rows {
		sign, verdict := "at most", "missed"
		if r.AtLeast {
			sign = "at least"
		}
		if r.Met() {
			verdict = "met"
			met++
		}
		measured := number(r.Got, r.Unit)
		if r.Of != "" {
			measured += " (" + r.Of + ")"
		}
		if r.Remark != "" {
			verdict += ": " + r.Remark
		}
		fmt.Fprintf(tw, "%s\t%s %s\t%s\t%.2f\t%s\n", r.What, sign, number(r.Target, r.Unit), measured, r.Ratio(), verdict)
	}
	_ = tw.Flush()
	fmt.Fprintf(w, "%d of %d met; a ratio above 1 is better than the target\n", met, len(rows))
}

func number(v float64, unit string) string {
	s := strings.TrimRight(strings.TrimRight(fmt.Sprintf("%.2f", v), "0"), ".")
	if unit == "" {
		return s
	}
	return s + " " + unit
}
