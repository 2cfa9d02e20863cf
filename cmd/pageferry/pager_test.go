package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/testutil"
)

// pagerPIDs are pager and keeper of a migration, by their cgroups.
func pagerPIDs(t *testing.T, id string) (pager, keeper int) {
	t.Helper()
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	one := func(who string) int {
		for _, above := range []string{"", "*", "*/*", "*/*/*"} {
			dirs, _ := filepath.Glob(filepath.Join(root.Dir(), above, "pageferry-pagers", id, who))
			for _, d := range dirs {
				if pids, err := cgroup.At(d).Procs(); err == nil && len(pids) == 1 {
					return pids[0]
				}
			}
		}
		t.Fatalf("the %s of migration %s is in no cgroup of its own", who, id)
		return 0
	}
	return one("pager"), one("keeper")
}

// serving starts a migration and returns when pages arrive after the switch.
func (h *twoHosts) serving(pid int) appliance.Report {
	h.t.Helper()
	source := h.client("a")
	defer source.Close()
	r, err := source.Migrate(h.t.Context(), appliance.MigrateRequest{PID: pid, Mode: "postcopy", To: h.lab.Host("b").Addr().String()})
	if err != nil {
		h.t.Fatal(err)
	}
	testutil.Eventually(h.t, 30*time.Second, func() error {
		now, err := source.Show(h.t.Context(), r.ID)
		if err != nil || now.State != "serving" {
			return fmt.Errorf("it is %s, %s, %v", now.State, now.Reason, err)
		}
		r = now
		return nil
	})
	return r
}

// TestPagerKilledWhilePagesArrive: another takes over, also with the daemon
// killed beside it. With the keeper killed as well nothing is left of the memory
// that was missing: the process must not work with zeros, and the source keeps
// what it has.
func TestPagerKilledWhilePagesArrive(t *testing.T) {
	for _, c := range []struct {
		name           string
		daemon, keeper bool
	}{{"pager", false, false}, {"pager and daemon", true, false}, {"pager and keeper", false, true}, {"all", true, true}} {
		t.Run(c.name, func(t *testing.T) {
			h := newTwoHosts(t)
			pid := h.workload("a")
			r := h.serving(pid)
			pager, keeper := pagerPIDs(t, r.ID)
			victims := []int{pager}
			if c.keeper {
				// The keeper cannot start another pager, but the pager another keeper.
				if err := unix.Kill(pager, unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				victims = []int{keeper, pager}
			}
			if c.daemon {
				h.end("b", unix.SIGKILL)
			}
			for _, v := range victims {
				if err := unix.Kill(v, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			if c.daemon {
				h.start("b")
			}
			got := h.watch("a", r.ID)
			if !c.keeper {
				if got.Outcome != appliance.OutcomeDone {
					t.Fatalf("%+v", got)
				}
				if err := h.runs("b", got.DestPID); err != nil {
					t.Errorf("at the destination: %v", err)
				}
				return
			}
			if got.Outcome != appliance.OutcomeLost {
				t.Errorf("%+v", got)
			}
			if h.rss("b", r.DestPID) != 0 {
				t.Error("it runs on without its memory")
			}
			status, err := os.ReadFile(fmt.Sprintf("%s/proc/%d/status", h.lab.Host("a").Root(), pid))
			if err != nil || !strings.Contains(string(status), "VmRSS") {
				t.Errorf("the source has not kept its copy: %v", err)
			}
		})
	}
}
