package appliance

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance/journal"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
)

// TestResolve: migrations that a person has to decide, left by an earlier daemon,
// with a destination that nobody reaches.
func TestResolve(t *testing.T) {
	testutil.Require(t, testutil.Root)
	for _, c := range []struct {
		state, owner string
		then         Outcome
		step         string // what the engine is told
		refused      string // or why not
	}{
		{"in-doubt", OwnerSource, OutcomeFailed, "thaw", ""},
		{"in-doubt", OwnerDestination, OutcomeDone, "kill", ""},
		{"lost", OwnerSource, OutcomeFailed, "thaw", ""},
		{"committed", OwnerSource, OutcomeFailed, "thaw", ""},
		{"committed", OwnerDestination, "", "", "resolve at the destination first"},
		{"in-doubt", "me", OutcomeInDoubt, "", "source or destination"},
	} {
		t.Run(c.state+" "+c.owner, func(t *testing.T) {
			testutil.NoLeaks(t)
			cfg := hostConfig(t, "a")
			store, err := journal.Open(filepath.Join(cfg.StateDir, "journal"), journal.Options{})
			if err != nil {
				t.Fatal(err)
			}
			j, err := store.Create(migrate.Record{Migration: [16]byte{1}, State: c.state, Started: time.Now(), Role: migrate.RoleSource,
				Mode: migrate.ModePostCopy, SourcePID: 4242, PeerAddress: testutil.FreePort(t), PeerIncarnation: migrate.Incarnation{9}})
			if err != nil {
				t.Fatal(err)
			}
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			e := newFakeEngine()
			d := startDaemon(t, cfg, e)
			testutil.Eventually(t, 20*time.Second, func() error {
				_, rep, err := d.registry.find("01")
				if err == nil && !rep.Finished() && c.state != "committed" || !strings.Contains(e.history(), "adopt") {
					err = errNotYet
				}
				return err
			})
			var rep Report
			testutil.Eventually(t, 20*time.Second, func() error {
				rep, err = d.client.Resolve(t.Context(), "01", ResolveRequest{Owner: c.owner})
				if err != nil && strings.Contains(err.Error(), errNotUp.Error()) {
					return err
				}
				return nil
			})
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Fatalf("%+v, %v", rep, err)
				}
				if h := e.history(); strings.Contains(h, "thaw") || strings.Contains(h, "kill") {
					t.Errorf("the daemon did %s", h)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, 20*time.Second, func() error {
				if _, rep, err = d.registry.find("01"); err == nil && rep.Outcome != c.then {
					err = errNotYet
				}
				return err
			})
			if h := e.history(); strings.Count(h, c.step) != 1 {
				t.Errorf("the daemon did %s, want one %s", h, c.step)
			}
			if n := len(d.registry.list()); n != 1 {
				t.Errorf("%d reports of one migration", n)
			}
			// A second decision finds the first.
			if again, err := d.client.Resolve(t.Context(), "01", ResolveRequest{Owner: c.owner}); err == nil || !strings.Contains(err.Error(), "decided") {
				t.Errorf("resolved again: %+v, %v", again, err)
			}
			if strings.Count(e.history(), c.step) != 1 {
				t.Errorf("resolved again, the daemon did %s", e.history())
			}
		})
	}
}
