package bench

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedianAndQuantile(t *testing.T) {
	for _, c := range []struct {
		in          []float64
		median, p99 float64
	}{
		{nil, 0, 0}, {[]float64{7}, 7, 7}, {[]float64{3, 1}, 2, 3}, {[]float64{5, 1, 3}, 3, 5},
	} {
		if got := Median(c.in); got != c.median {
			t.Errorf("median of %v: %v", c.in, got)
		}
		if got := Quantile(c.in, 0.99); got != c.p99 {
			t.Errorf("p99 of %v: %v", c.in, got)
		}
	}
	var many []int
	for i := range 1000 {
		many = append(many, 1000-i)
	}
	for q, want := range map[float64]int{0.5: 500, 0.99: 990, 1: 1000, 0: 1} {
		if got := Quantile(many, q); got != want {
			t.Errorf("quantile %v of 1 to 1000: %d", q, got)
		}
	}
	if many[0] != 1000 {
		t.Error("the input was sorted")
	}
}

func TestTable(t *testing.T) {
	var table Table
	table.Add(Row{What: "gap", Target: 30, Got: 99, Unit: "ms"})
	table.Add(Row{What: "rate", Target: 1.5, Got: 3, Unit: "GiB/s", AtLeast: true, Of: "3 of 4"})
	table.Add(Row{What: "gap", Target: 30, Got: 20, Unit: "ms", Remark: "again"})
	table.Add(Row{What: "memory", Target: 96, Got: 192, Unit: "MiB"})
	var out bytes.Buffer
	table.Print(&out)
	for _, want := range []string{
		"gap     at most 30 ms       20 ms             1.50   met: again\n",
		"rate    at least 1.5 GiB/s  3 GiB/s (3 of 4)  2.00   met\n",
		"memory  at most 96 MiB      192 MiB           0.50   missed\n",
		"2 of 3 met",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestLogBook(t *testing.T) {
	b := newLogBook()
	for _, part := range []string{
		"time=2026-01-02T03:04:05.250Z level=INFO msg=switched migration=ab downtime=3ms\n",
		"time=2026-01-02T03:04:05.000Z level=DEBUG msg=\"frozen and captured\" pid=50 freeze=8.5ms image_bytes=41600\ntime=x msg=reb",
		"uild migration=ab step=\"thread state\" took=303µs\ntime=x msg=finished migration=ab role=source pid=50 reason=\"\"\n",
		"half a line",
	} {
		if _, err := b.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	steps, err := b.finished(t.Context(), "ab", "source")
	want := []Step{{"switched: downtime", 3 * time.Millisecond}, {"frozen and captured: freeze", 8500 * time.Microsecond}, {"rebuild: thread state", 303 * time.Microsecond}}
	if err != nil || !slices.Equal(steps, want) {
		t.Errorf("%v, %v; want %v", steps, err, want)
	}
	if at := b.ranAt("ab"); !at.Equal(time.Date(2026, 1, 2, 3, 4, 5, 250e6, time.UTC)) {
		t.Errorf("switched at %v", at)
	}
	if steps := b.take(""); len(steps) != 0 {
		t.Errorf("taken twice: %v", steps)
	}
}

func TestParseTouched(t *testing.T) {
	got, err := parseTouched("moved b 17 2500 300000\n", "b")
	if err != nil || got.Hits != 17 || !slices.Equal(got.Faults, []time.Duration{2500, 300 * time.Microsecond}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "moved b", "moved a 17 2500", "moved b x", "moved b 1 y"} {
		if _, err := parseTouched(bad, "b"); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
