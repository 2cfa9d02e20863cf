package survive_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// side is which end of a migration is killed.
type side string

const (
	source      side = "source"
	destination side = "destination"
)

// moment is a kill point, and how often it is passed before: in all, or where round
// is not 0 in that one; see roundEnds.
type moment struct {
	side  side
	point string
	nth   int
	round int
}

// roundEnds are passed at the end of what counts as a round: the sample that is
// sent before the first one counts, too, and at the source looksBefore looks that
// are taken before anything is sent.
const looksBefore = 2

var roundEnds = map[side]string{source: "source/engine/look/after", destination: "restore/lay/after"}

func (m moment) String() string {
	if m.round > 0 {
		return fmt.Sprintf("%s, %s, round %d", m.side, m.point, m.round)
	}
	if m.nth > 1 {
		return fmt.Sprintf("%s, %s, time %d", m.side, m.point, m.nth)
	}
	return fmt.Sprintf("%s, %s", m.side, m.point)
}

// moments chooses from the points that a side has passed. Those of migrate are
// all different; of those that one batch of injected work after the other
// passes, the first, one in the middle and the last are taken.
func moments(s side, passed []string) []moment {
	count := map[string]int{}
	var names []string
	for _, p := range passed {
		if count[p]++; count[p] == 1 {
			names = append(names, p)
		}
	}
	var out []moment
	for _, p := range names {
		n := count[p]
		at := []int{1}
		if strings.HasPrefix(p, "inject/") && n > 2 {
			at = []int{1, (n + 1) / 2, n}
		}
		for _, i := range at {
			out = append(out, moment{side: s, point: p, nth: i})
		}
	}
	return out
}

// calm is what a program is after its daemon was killed: it lives once, runs,
// and found nothing wrong.
func (g *guest) calm() error {
	if err := g.r.leftovers(g); err != nil {
		return err
	}
	if s := g.said(); s != "" {
		return fmt.Errorf("%s: %s", g.identity, s)
	}
	return nil
}

// survived fails the test unless the program lives on in peace, in one place,
// and both hosts know how the migration ended. It returns the reports of it.
func (g *guest) survived(t testing.TB, began time.Time) {
	t.Helper()
	testutil.Eventually(t, patience(15*time.Second), g.calm)
	g.beat(3)
	g.oneOwner(1 << 20)
	for _, n := range g.r.nodes() {
		reps, err := n.list()
		if err != nil {
			t.Fatal(err)
		}
		for _, rep := range reps {
			if rep.Started.Before(began) {
				continue
			}
			switch {
			case rep.Outcome == appliance.OutcomeInDoubt, rep.Outcome == appliance.OutcomeLost:
				t.Errorf("host %s: outcome %s: %s", n.name(), rep.Outcome, rep.Reason)
			case rep.Outcome != appliance.OutcomeDone && rep.Reason == "":
				t.Errorf("host %s: outcome %s, and no reason", n.name(), rep.Outcome)
			case rep.Role == appliance.RoleSource && rep.Outcome == appliance.OutcomeDone && n == g.at:
				t.Errorf("host %s: the report says that it has left, but it is here", n.name())
			case rep.Role == appliance.RoleSource && rep.Outcome != appliance.OutcomeDone && n != g.at:
				t.Errorf("host %s: the report says %s, %s, but the program lives on the other host", n.name(), rep.Outcome, rep.Reason)
			}
		}
	}
}

// begin asks for a migration and does not wait for it.
func (g *guest) begin(req appliance.MigrateRequest) (id string, err error) {
	c := g.at.api()
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience(20*time.Second))
	defer cancel()
	rep, err := c.Migrate(ctx, req)
	return rep.ID, err
}

// script is a migration that goes a certain way, beside the kill: it begins one
// and returns. g's migration is over when both hosts are idle.
type script struct {
	name string
	// run begins the migration. Its error does not matter if a daemon was killed.
	run func(g *guest, mode string) error
	// prepare, if set, makes the daemons do something at a point, besides.
	act func(g *guest, s side, point string)
	// away is how long a daemon that was killed stays away.
	away time.Duration
}

// plain is a migration with which nothing is wrong.
var plain = script{name: "plain", run: func(g *guest, mode string) error {
	_, err := g.begin(g.request(mode))
	return err
}}

// canceled is one that is given up just before the commit.
var canceled = script{
	name: "canceled", run: plain.run,
	act: func(g *guest, s side, point string) {
		if s == source && point == "source/recv/ready" {
			g.cancelAll()
		}
	},
}

// cancelAll asks the source to give up whatever leaves it.
func (g *guest) cancelAll() {
	reps, err := g.at.list()
	if err != nil {
		return
	}
	c := g.at.api()
	defer c.Close()
	for _, rep := range reps {
		if !rep.Finished() {
			_, _ = c.Cancel(context.Background(), rep.ID)
		}
	}
}

// killAt moves the guest, with one daemon killed at each of ms, in turn: the
// second time it is the one that came back. Every daemon that was killed is
// brought back at once.
func (g *guest) killAt(t *testing.T, sc script, mode string, ms ...moment) (reached bool) {
	t.Helper()
	began := time.Now()
	from := g.at
	nodes := map[side]*node{source: from, destination: g.r.other(from)}
	dead := make(chan *node, len(ms))
	var mu sync.Mutex
	count := map[moment]int{}
	round := map[side]int{source: 1, destination: 1}
	left := slices.Clone(ms)
	for s, n := range nodes {
		n.points.do(func(point string) {
			if sc.act != nil {
				sc.act(g, s, point)
			}
			mu.Lock()
			hit := false
			if len(left) > 0 && left[0].side == s && left[0].point == point {
				m := left[0]
				if m.round == 0 || m.round == round[s] {
					count[m]++
				}
				if hit = count[m] == m.nth; hit {
					left = left[1:]
				}
			}
			if point == roundEnds[s] {
				round[s]++
			}
			mu.Unlock()
			if hit {
				n.kill()
				dead <- n
			}
		})
	}
	err := sc.run(g, mode)
	if err != nil {
		select { // it may have been killed before it could answer
		case <-from.daemon.Load().Done():
		case <-time.After(5 * time.Second):
			t.Fatal(err)
		}
	}
	for range ms {
		over := time.Now().Add(20 * time.Second)
		var n *node
		for n == nil && time.Now().Before(over) {
			select {
			case n = <-dead:
			case <-time.After(5 * time.Millisecond):
				if g.calm() != nil {
					continue
				}
				// Over without having come there, or just now.
				select {
				case n = <-dead:
				case <-time.After(20 * time.Millisecond):
					over = time.Time{}
				}
			}
		}
		if n == nil {
			mu.Lock()
			t.Logf("not reached: %v", left)
			mu.Unlock()
			break // not every migration passes every point
		}
		time.Sleep(sc.away)
		n.launch(t)
		if err := n.await(); err != nil && !errors.Is(err, errEnded) {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		if n.killed() {
			n.points.do(nil)
			n.start(t)
		}
	}
	g.survived(t, began)
	for _, n := range nodes {
		n.points.do(nil)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Logf("took %v", d)
	}
	mu.Lock()
	defer mu.Unlock()
	return len(left) == 0
}

// trace lets the guest go through a script and returns which points each side
// passed, without those before the killing of ms.
func (g *guest) trace(t *testing.T, sc script, mode string, ms ...moment) map[side][]string {
	t.Helper()
	from, to := g.at, g.r.other(g.at)
	seen := map[side][]string{}
	var mu sync.Mutex
	cut := false
	all := script{name: sc.name, run: sc.run, act: func(g *guest, s side, point string) {
		if sc.act != nil {
			sc.act(g, s, point)
		}
		mu.Lock()
		defer mu.Unlock()
		seen[s] = append(seen[s], point)
		for _, m := range ms {
			if m.side == s && m.point == point && !cut { // from here on anew
				cut = true
				seen[source], seen[destination] = nil, nil
			}
		}
	}}
	g.killAt(t, all, mode, ms...)
	testutil.Eventually(t, patience(15*time.Second), g.calm)
	from.points.do(nil)
	to.points.do(nil)
	mu.Lock()
	defer mu.Unlock()
	return seen
}

// Either daemon is killed at every kill point of a migration.
func TestKilledDaemon(t *testing.T) {
	begin(t)
	k := newKiller(t, still)
	passed := k.look(plain)
	all := append(moments(source, passed[source]), moments(destination, passed[destination])...)
	if len(all) < 80 {
		t.Fatalf("only %d kill points were passed: %v", len(all), all)
	}
	for _, m := range all {
		k.kill(plain, m)
	}
	k.end()
}

// A migration that is given up, its daemons killed on the way back.
func TestKilledWhileCanceled(t *testing.T) {
	begin(t)
	k := newKiller(t, still)
	const from = "source/recv/ready"
	passed := k.look(canceled)
	for s, points := range passed {
		if i := slices.Index(points, from); i >= 0 {
			passed[s] = points[i:]
		}
	}
	// What the destination passes before READY is the same as ever.
	if i := slices.Index(passed[destination], "destination/send/ready/after"); i >= 0 {
		passed[destination] = passed[destination][i:]
	}
	all := append(moments(source, passed[source]), moments(destination, passed[destination])...)
	if !slices.Contains(all, moment{source, "source/journal/aborted/after", 1, 0}) || !slices.Contains(all, moment{destination, "destination/engine/abort/before", 1, 0}) {
		t.Fatalf("it was not canceled: %v", all)
	}
	for _, m := range all {
		k.kill(canceled, m)
	}
	k.end()
}

// A daemon that takes up what another one left is killed as well.
func TestKilledTwice(t *testing.T) {
	begin(t)
	k := newKiller(t, still)
	// What follows one first kill mostly follows another of the same side, too,
	// and is done once for each side.
	done := map[side]map[moment]bool{source: {}, destination: {}}
	for _, first := range []moment{
		{source, "source/journal/committed/after", 1, 0},
		{source, "source/journal/serving/after", 1, 0},
		{source, "source/engine/hold/after", 1, 0},
		{destination, "destination/journal/ready/after", 1, 0},
		{destination, "destination/journal/committed/after", 1, 0},
		{destination, "destination/journal/running/after", 1, 0},
	} {
		passed := k.look(plain, first)
		all := append(moments(source, passed[source]), moments(destination, passed[destination])...)
		all = slices.DeleteFunc(all, func(m moment) bool { return m == first || m.nth > 1 })
		if len(all) < 5 {
			t.Errorf("after %v only these were passed: %v", first, all)
		}
		for _, m := range all {
			if !done[first.side][m] {
				done[first.side][m] = true
				k.kill(plain, first, m)
			}
		}
	}
	k.end()
}
