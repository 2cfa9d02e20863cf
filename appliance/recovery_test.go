package appliance

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance/journal"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
)

// TestOlderMigrationOfTheSameProcess: a first migration was aborted, and its
// destination has not been reached since; a second one is committed. A daemon
// that comes back must not let the process run for the sake of the first.
func TestOlderMigrationOfTheSameProcess(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	c := hostConfig(t, "a")
	store, err := journal.Open(filepath.Join(c.StateDir, "journal"), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	nobody := testutil.FreePort(t)
	now := time.Now()
	for i, r := range []migrate.Record{
		{Migration: [16]byte{1}, State: "aborted", Started: now.Add(-time.Hour)},
		{Migration: [16]byte{2}, State: "committed", Started: now},
		{Migration: [16]byte{3}, State: "aborted", Started: now.Add(-2 * time.Hour)},
	} {
		r.Role, r.Mode, r.SourcePID, r.Hint = migrate.RoleSource, migrate.ModePostCopy, 4242, []byte("start 7")
		r.PeerAddress, r.PeerIncarnation = nobody, migrate.Incarnation{9}
		j, err := store.Create(r)
		if err != nil {
			t.Fatal(i, err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	e := newFakeEngine()
	d := startDaemon(t, c, e)
	// Two end with what they were, and go on telling; one goes on for good.
	testutil.Eventually(t, 10*time.Second, func() error {
		_, first, err := d.registry.find("01")
		if err == nil && first.Outcome != OutcomeFailed {
			err = errNotYet
		}
		if err == nil {
			_, first, err = d.registry.find("03")
			if err == nil && first.Outcome != OutcomeFailed {
				err = errNotYet
			}
		}
		return err
	})
	if h := e.history(); strings.Contains(h, "thaw") || strings.Count(h, "adopt-4242") != 1 {
		t.Errorf("the daemon did %s", h)
	}
	if _, err := d.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: nobody}); err == nil {
		t.Error("a process that is committed was taken")
	}
}

var errNotYet = errors.New("not yet")
