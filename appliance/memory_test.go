package appliance

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// TestMemory: where an arriving process can be read is said at the destination alone,
// and kept memory is let go of there.
func TestMemory(t *testing.T) {
	a, b := twoDaemons(t)
	resume := b.engine.hold("resident")
	defer resume()
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen, Mode: "postcopy", Shown: ShownKeep})
	if err != nil || !r.Kept {
		t.Fatal(r, err)
	}
	testutil.Eventually(t, 20*time.Second, func() error {
		m, err := b.client.Memory(t.Context(), r.ID[:8])
		if err == nil && (m.ID != r.ID || m.Dir != "/shown" || !m.Kept || m.PagesResident != 7 || m.Comm != "fake" || m.PID != 4711) {
			err = errors.New("not yet")
		}
		return err
	})
	if _, rep, err := b.registry.find(r.ID); err != nil || !rep.Kept {
		t.Errorf("the destination does not know that it is kept: %v", err)
	}
	refused := func(what string, err error, want string) {
		t.Helper()
		var api *APIError
		if !errors.As(err, &api) || api.Kind != KindRefused || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = a.client.Memory(t.Context(), r.ID)
	refused("asked at the source", err, "it leaves this host; ask on")
	_, err = a.client.Release(t.Context(), r.ID)
	refused("released at the source", err, "it leaves this host; ask on")
	if rep, err := b.client.Release(t.Context(), r.ID); err != nil || rep.Kept || !b.engine.did("unkeep") {
		t.Errorf("release: %+v, %v", rep, err)
	}
	resume()
	finish(t, a, r.ID)
	testutil.Eventually(t, 20*time.Second, func() error {
		_, rep, err := b.registry.find(r.ID)
		if err == nil && !rep.Finished() {
			err = errors.New("not finished")
		}
		return err
	})
	_, err = b.client.Memory(t.Context(), r.ID)
	refused("asked when it is over", err, "it has arrived")
	var api *APIError
	if _, err := b.client.Memory(t.Context(), "00"); !errors.As(err, &api) || api.Kind != KindUnknown {
		t.Errorf("asked after what is not known: %v", err)
	}
}

// TestShownOption: keep and drop, and whose word counts.
func TestShownOption(t *testing.T) {
	c := hostConfig(t, "a")
	for _, o := range []struct {
		byDefault, shown, trap string
		keep                   bool
		err                    string
	}{
		{"", "", "", false, ""}, {"", "keep", "", true, ""}, {"keep", "", "", true, ""}, {"keep", "drop", "", false, ""},
		{"keep", "", "uffd", false, ""}, {"", "keep", "uffd", false, "nothing is shown with trap uffd"},
		{"", "for ever", "", false, `"for ever" is not known; it is one of drop, keep`},
	} {
		c.Defaults.Shown = o.byDefault
		d, err := NewDaemon(c, newFakeEngine(), nil)
		if err != nil {
			t.Fatal(err)
		}
		so, err := d.options(MigrateRequest{PID: 4242, To: "h", Shown: o.shown, Trap: o.trap})
		var usage *UsageError
		if o.err != "" && (!errors.As(err, &usage) || !strings.Contains(err.Error(), o.err)) || o.err == "" && (err != nil || so.Keep != o.keep) {
			t.Errorf("%+v: keep %v, %v", o, so.Keep, err)
		}
	}
	c.Defaults.Shown = "always"
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "defaults.shown") {
		t.Errorf("a wrong default: %v", err)
	}
	for _, keep := range []bool{true, false} {
		if _, as := recallLanes("start 7" + hintLanes(SourceOptions{BulkLanes: 3, Trap: TrapAuto, Keep: keep})); as.Keep != keep || as.BulkLanes != 3 || as.Trap != TrapAuto {
			t.Errorf("recalled %+v", as)
		}
	}
}
