package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

// TestPrintOutlook: all that the model says is in the table, and where it is from.
func TestPrintOutlook(t *testing.T) {
	var out bytes.Buffer
	printOutlook(&out, nil)
	if out.Len() != 0 {
		t.Errorf("of nothing: %q", out.String())
	}
	printOutlook(&out, &appliance.Outlook{Unmeasured: "too little"})
	if s := out.String(); !strings.Contains(s, "too little") || !strings.Contains(s, "cannot be predicted") {
		t.Errorf("%q", s)
	}
	out.Reset()
	printOutlook(&out, &appliance.Outlook{
		Measured: &appliance.Measurement{Tracker: "wp-async", Dirty: []appliance.DirtyPoint{{MS: 50, Bytes: 3 << 20}}},
		Link:     &appliance.Link{BytesPerSecond: 1 << 30, From: "measured with 7 MiB of its pages"},
		Predictions: []migrate.Predicted{
			{Mode: "stop", TotalMS: 12345, DowntimeMS: 12345, BytesSent: 4 << 30, Rounds: 1, Reason: "all at once"},
			{Mode: "hybrid", TotalMS: 900, DowntimeMS: 21, BytesSent: 5 << 30, BytesResent: 1 << 30, Rounds: 4, Converges: true, Reason: "little is left"},
		},
		Auto: "hybrid", AutoReason: "it converges",
	})
	for _, want := range []string{"3.0 MiB in 50 ms", "wp-async", "1.0 GiB/s", "7 MiB of its pages", "12.3 s", "all at once",
		"hybrid  900 ms  21 ms     5.0 GiB  1.0 GiB  4       yes", "auto would choose hybrid: it converges"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	p := &migrate.Predicted{TotalMS: 900, DowntimeMS: 21, BytesWire: 1 << 20, Rounds: 3}
	r := appliance.Report{Outcome: appliance.OutcomeDone, TotalMS: 950, DowntimeMS: 33, BytesWire: 2 << 20, Predicted: p, Rounds: make([]appliance.Round, 2)}
	out.Reset()
	printSummary(&out, r)
	if want := "total 900 ms, downtime 21 ms, wire 1.0 MiB, 3 rounds; it was 950 ms, 33 ms, 2.0 MiB, 2"; !strings.Contains(out.String(), want) {
		t.Errorf("%q is not in\n%s", want, out.String())
	}
}
