package survive_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// resolve is a person's decision, on n's command line.
func (n *node) resolve(t *testing.T, id, owner string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := n.host.Run(ctx, pageferry(t), "resolve", id, "--owner", owner)
	if err != nil {
		t.Fatalf("host %s: resolve %s --owner %s: %v\n%s\n%s", n.name(), id, owner, err, out, n.log.tail(4000))
	}
}

// state is what n's daemon says of a migration.
func (n *node) state(id, want string) func() error {
	return func() error {
		reps, err := n.list()
		if err != nil {
			return err
		}
		for _, r := range reps {
			if r.ID == id && r.State == want {
				return nil
			}
		}
		return fmt.Errorf("host %s: migration %s is not %s: %+v", n.name(), id, want, reps)
	}
}

// TestResolve: one daemon dies in the middle of the switch and stays away; a
// person decides on the other host; the daemon that was away comes back and
// obeys. The process lives on where the person wanted it, and nowhere else.
func TestResolve(t *testing.T) {
	begin(t)
	r, top := newRig(t), t
	g := r.small(t, r.a)
	for _, c := range []struct {
		mode  string
		dies  side
		point string
		state string // of the migration on the other host
		owner string
	}{
		{"stop", source, "source/engine/hold/after", "ready", appliance.OwnerDestination},
		{"stop", source, "source/journal/committed/after", "ready", appliance.OwnerDestination},
		{"stop", source, "source/journal/committed/after", "ready", appliance.OwnerSource},
		{"postcopy", source, "source/journal/committed/after", "ready", appliance.OwnerSource},
		{"postcopy", destination, "destination/recv/commit", "committed", appliance.OwnerSource},
		{"stop", destination, "destination/journal/committed/after", "committed", appliance.OwnerSource},
	} {
		name := fmt.Sprintf("%s, %s, owner %s", c.mode, c.point, c.owner)
		top.Run(name, func(t *testing.T) {
			if r.broken {
				r = newRig(top)
				g = r.small(top, r.a)
			}
			r.watch(t)
			g.t = t
			began := time.Now()
			from, to := g.at, r.other(g.at)
			dead, alive := from, to
			if c.dies == destination {
				dead, alive = to, from
			}
			reached := dead.points.at(moment{c.dies, c.point, 1, 0}, dead.kill)
			id, err := g.begin(g.request(c.mode))
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-reached:
			case <-time.After(20 * time.Second):
				t.Fatalf("%s was not passed", c.point)
			}
			dead.points.do(nil)
			testutil.Eventually(t, 20*time.Second, alive.state(id, c.state))
			alive.resolve(t, id, c.owner)
			home := from
			if c.owner == appliance.OwnerDestination {
				home = to
			}
			if home == alive { // it runs there although the other is away
				g.beat(3)
			}
			dead.start(t)
			g.survived(t, began)
			if g.at != home {
				t.Errorf("it lives on host %s, want %s", g.at.name(), home.name())
			}
		})
	}
}
