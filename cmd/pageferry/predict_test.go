package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

// TestPredict: a dry run measures a running process and a link that the kernel
// shapes, and leaves nothing in the process; the migration by auto after it reports
// what was expected beside what happened.
func TestPredict(t *testing.T) {
	h := newTwoHosts(t)
	pid := h.workload("a")
	source := h.client("a")
	defer source.Close()
	to := h.lab.Host("b").Addr().String()
	before := h.traces("a", pid)
	rep, err := source.DryRun(t.Context(), appliance.MigrateRequest{PID: pid, To: to})
	if err != nil || len(rep.Reasons) != 0 || rep.Destination != "b" || rep.Outlook == nil {
		t.Fatalf("%+v, %v", rep, err)
	}
	o := rep.Outlook
	if o.Unmeasured != "" || o.Link == nil || o.Measured == nil || len(o.Predictions) != 4 || o.Auto == "" {
		t.Fatalf("%+v", o)
	}
	// 400 Mbit/s are 47.7 MiB/s, and what the shaper lets pass at once comes on top.
	if r := o.Link.BytesPerSecond / (1 << 20); r < 2 || r > 70 {
		t.Errorf("a link of 400 Mbit/s is said to carry %.1f MiB/s", r)
	}
	if x := o.Link.WireShare; x < 0.8 || x > 1.1 {
		t.Errorf("random pages take %.2f of their size", x)
	}
	// 128 MiB, of which 32 MiB are dirtied each second.
	if m := o.Measured; m.BytesMemory < 90<<20 || len(m.Dirty) == 0 || m.Dirty[0].Bytes == 0 || m.Dirty[0].Bytes > 64<<20 {
		t.Errorf("measured %+v", m)
	}
	for _, p := range o.Predictions {
		if long := p.DowntimeMS > 1000; p.TotalMS < 1000 || p.Mode == migrate.ModeStop && !long || p.Mode == migrate.ModePostCopy && long {
			t.Errorf("predicted %+v", p)
		}
	}
	if after := h.traces("a", pid); after != before {
		t.Errorf("the dry run left something: %s; before it was %s", after, before)
	}
	if err := h.runs("a", pid); err != nil {
		t.Error(err)
	}
	for _, host := range []string{"a", "b"} {
		c := h.client(host)
		if rs, err := c.List(t.Context()); err != nil || len(rs) != 0 {
			t.Errorf("host %s keeps %+v, %v", host, rs, err)
		}
		c.Close()
	}

	r, err := source.Migrate(t.Context(), appliance.MigrateRequest{PID: pid, To: to})
	if err != nil {
		t.Fatal(err)
	}
	got := h.watch("a", r.ID)
	p := got.Predicted
	if got.Outcome != appliance.OutcomeDone || p == nil || string(p.Mode) != got.Mode || p.TotalMS < 1000 || p.BytesWire < 80<<20 {
		t.Fatalf("%+v, predicted %+v", got, p)
	}
	if all := strings.Join(got.Remarks, "\n"); !strings.Contains(all, "chosen by auto") {
		t.Errorf("remarks %q", all)
	}
	t.Logf("%s", predictedText(p, &got))
	if err := h.runs("b", got.DestPID); err != nil {
		t.Error(err)
	}
}

// traces are what a tracker or a tracer would leave in a process: descriptors,
// mappings that are watched, a tracer, another cgroup.
func (h *twoHosts) traces(name string, pid int) string {
	h.t.Helper()
	dir := fmt.Sprintf("%s/proc/%d", h.lab.Host(name).Root(), pid)
	read := func(file string) string {
		data, err := os.ReadFile(dir + "/" + file)
		if err != nil {
			h.t.Fatal(err)
		}
		return string(data)
	}
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		h.t.Fatal(err)
	}
	watched := 0
	for line := range strings.Lines(read("smaps")) {
		if f := strings.Fields(line); f[0] == "VmFlags:" && strings.Contains(line, " uw") {
			watched++
		}
	}
	tracer := "?"
	for line := range strings.Lines(read("status")) {
		if rest, ok := strings.CutPrefix(line, "TracerPid:"); ok {
			tracer = strings.TrimSpace(rest)
		}
	}
	return fmt.Sprintf("%d descriptors, %d watched mappings, tracer %s, cgroups %s", len(fds), watched, tracer, strings.TrimSpace(read("cgroup")))
}
