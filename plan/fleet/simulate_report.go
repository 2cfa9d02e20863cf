package fleet

import (
	"bytes"
	"fmt"
	"text/tabwriter"
	"time"
)

// Bound returns what the links need at least to move processes to where they go,
// and which host needs it: the bytes that must leave it, or come to it, by the rate of its link. Where
// the budget needs longer the name is "". What the schedule, dirtied pages and switches cost comes on top.
func Bound(f Fleet, to map[string]string) (time.Duration, string) {
	x, err := f.hosts()
	if err != nil {
		return 0, ""
	}
	out, in, all := make([]float64, len(f.Hosts)), make([]float64, len(f.Hosts)), 0.0
	for i := range f.Processes {
		p := &f.Processes[i]
		from, here := x.number[p.Host]
		dest, there := x.number[to[p.ID]]
		if here && there {
			out[from] += float64(p.Memory)
			in[dest] += float64(p.Memory)
			all += float64(p.Memory)
		}
	}
	longest, host := 0.0, ""
	for h := range f.Hosts {
		if s := max(out[h], in[h]) / x.rate[h]; s > longest {
			longest, host = s, f.Hosts[h].Name
		}
	}
	if b := f.Limits.Budget; b > 0 && all/b > longest {
		longest, host = all/b, ""
	}
	return seconds(longest), host
}

// Ratio is how many times the bound it took. 0: nothing arrived.
func (r *Result) Ratio() float64 {
	if r.Bound <= 0 {
		return 0
	}
	return r.Total.Seconds() / r.Bound.Seconds()
}

// Report is several results, to compare.
type Report []*Result

// Compare runs one simulation in several orders. Default: in all.
func Compare(m Simulation, orders ...Order) (Report, error) {
	if len(orders) == 0 {
		orders = []Order{LPT, Listed, Smallest}
	}
	var r Report
	for _, o := range orders {
		m.Order = o
		res, err := m.Run()
		if err != nil {
			return nil, err
		}
		r = append(r, res)
	}
	return r, nil
}

// String returns a table.
func (r Report) String() string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "order\ttotal\tbound\tratio\tdowntime\tlargest\tbytes\textra\tdone\tpost-copy\tfailed\trefused\tat once\t")
	for _, x := range r {
		extra := 0.0
		if x.Memory > 0 {
			extra = max(0, float64(x.Bytes)/float64(x.Memory)-1)
		}
		fmt.Fprintf(w, "%s\t%.1f s\t%.1f s\t%.3f\t%.2f s\t%.0f ms\t%s\t%.1f %%\t%d\t%d\t%d\t%d\t%d\t\n", x.Order, x.Total.Seconds(), x.Bound.Seconds(), x.Ratio(),
			x.Downtime.Seconds(), x.MaxDowntime.Seconds()*1000, size(x.Bytes), 100*extra, x.Done, x.PostCopy, x.Failed, x.Refused, x.Most)
	}
	w.Flush()
	return b.String()
}
