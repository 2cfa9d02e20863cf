package bench

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// BenchmarkStages says where a downtime goes: medians of every time that the
// daemons log about a migration. Some are parts of others: "switched" has the
// parts of the downtime as the source sees them, "frozen and captured" those of
// its freeze, "rebuild" and "rebuilt" those of its rebuild.
func BenchmarkStages(b *testing.B) { runAll(b, stagesList) }

func stagesList(s scale) []benchmark {
	return []benchmark{
		{"redis-" + sizeName(s.stages), func(m *meter) {
			st := m.stage(false)
			g, keys, err := st.Redis(m.ctx, s.stages)
			m.must(err)
			c, err := st.NewClient(keys)
			m.must(err)
			m.closing(c.Close)
			m.stages("redis "+sizeName(s.stages), st, g, func() { m.warm(c) })
		}},
		{fmt.Sprintf("threads-%d", s.threads), func(m *meter) {
			st := m.stage(false)
			g, p, err := st.Start(testutil.CC(m, "everything"), "--only", "regs", "--threads", strconv.Itoa(m.threads))
			m.must(err)
			m.must(g.said(m.ctx, p, "ready", time.Minute))
			m.stages(fmt.Sprintf("%d threads", m.threads), st, g, func() {})
		}},
	}
}

func (m *meter) stages(what string, st *Stage, g *Guest, before func()) {
	var order []string
	took := map[string][]time.Duration{}
	for hop := 0; m.loop(); hop++ {
		before()
		h := m.move(st, g, "postcopy")
		sum := map[string]time.Duration{}
		for _, s := range h.Steps {
			if !slices.Contains(order, s.Name) {
				order = append(order, s.Name)
			}
			sum[s.Name] += s.Took // some happen more than once
		}
		for name, d := range sum {
			took[name] = append(took[name], d)
		}
	}
	if len(took["switched: downtime"]) == 0 || len(took["rebuilt: rebuild"]) == 0 {
		m.Errorf("the daemons' logs do not say how long things took: %q", order)
	}
	var text strings.Builder
	tw := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "\t%s\tmedian\tmax\t\n", what)
	for _, name := range order {
		d := took[name]
		fmt.Fprintf(tw, "\t%s\t%.3f ms\t%.3f ms\t\n", name, MS(Median(d)), MS(Quantile(d, 1)))
		if short, ok := strings.CutPrefix(name, "switched: "); ok {
			m.report(MS(Median(d)), short+"-ms")
		}
	}
	_ = tw.Flush()
	note("\n%s", text.String())
}
