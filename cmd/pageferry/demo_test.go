package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/cmd/pageferry/demo"
	"github.com/pageferry/pageferry/internal/testutil"
)

func requireDemo(t *testing.T) {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Program("redis-server"))
	testutil.NoLeaks(t)
}

// TestDemo moves a real redis there and back, in each mode and over each kind of
// page lane.
func TestDemo(t *testing.T) {
	for _, c := range []struct{ name, args string }{
		{"auto", "--hops 2"},
		{"post-copy", "--mode postcopy --hops 1"},
		{"stop", "--mode stop --hops 2"},
		{"plain pages", "--plain-pages --hops 1"},
		{"insecure", "--insecure --hops 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			requireDemo(t)
			var out, errs bytes.Buffer
			a := &app{streams: streams{in: strings.NewReader(""), out: &out, err: &errs}, newEngine: newEngine}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			status := runApp(ctx, a, append([]string{"demo", "--size", "32MiB", "--json", "--verbose"}, strings.Fields(c.args)...))
			if status != exitDone {
				t.Fatalf("status %d:\n%s\n%s", status, out.String(), errs.String())
			}
			if strings.Contains(errs.String(), "pager has died") || !strings.Contains(errs.String(), "msg=switched") {
				t.Errorf("a pager ended by itself, or there is no log:\n%s", errs.String())
			}
			m := outcome{out: out.String()}.lastLine(t)
			hops, _ := m["hops"].([]any)
			if m["ok"] != true || len(hops) == 0 || m["keys_checked"].(float64) < 100 {
				t.Fatalf("%v", m)
			}
			for _, h := range hops {
				h := h.(map[string]any)
				r := h["report"].(map[string]any)
				if r["source_pid"] != 5000.0 || r["dest_pid"] != 5000.0 {
					t.Errorf("the pid was not kept: %v", r)
				}
				var pages float64
				for _, round := range r["rounds"].([]any) {
					pages += round.(map[string]any)["pages"].(float64)
				}
				if h["client_downtime_ms"].(float64) <= 0 || r["downtime_ms"].(float64) <= 0 || pages < 8192 {
					t.Errorf("not measured: %v", h)
				}
			}
		})
	}
}

// TestDemoCleansUpAfterCtrlC ends it at moments that differ in what stands:
// hosts, a redis that is being filled, a migration. NoLeaks looks for the rest.
func TestDemoCleansUpAfterCtrlC(t *testing.T) {
	for _, at := range []string{"making two hosts", "loading redis-server", "hop 1", "frozen", "serving", "hop 2"} {
		t.Run(at, func(t *testing.T) {
			requireDemo(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var errs bytes.Buffer
			cfg := demo.Config{Size: 64 << 20, Hops: 8, Clients: 2, Out: &stopAt{text: at, stop: cancel, to: &errs}}
			cfg.OnProgress = func(r appliance.Report) {
				if r.State == at {
					cancel()
				}
			}
			_, err := demo.Run(ctx, cfg)
			if err == nil || ctx.Err() == nil {
				t.Fatalf("it was not interrupted at %q: %v", at, err)
			}
			if strings.Contains(errs.String(), "not everything") {
				t.Error(errs.String())
			}
		})
	}
}

// stopAt calls stop when text is written, and at the fourth hop in any case: a
// state that passes faster than it is reported may not be seen.
type stopAt struct {
	text string
	stop func()
	to   *bytes.Buffer
}

func (s *stopAt) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte(s.text)) || bytes.Contains(p, []byte("hop 4")) {
		s.stop()
	}
	return s.to.Write(p)
}
