package survive_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
)

// endless is a pre-copy that does not come to its switch: a restless program
// writes more than the link carries in the downtime that is allowed. It goes
// through two rounds, some more in which the program is slowed, and gives up.
var endless = script{name: "rounds", run: func(g *guest, _ string) error {
	_, err := g.begin(g.endless())
	return err
}}

func (g *guest) endless() appliance.MigrateRequest {
	req := g.request("precopy")
	req.MaxDowntimeMS, req.MaxBandwidth, req.Throttle = 25, "300Mbit", 0.4
	return req
}

// restless is small, and writes all the time.
func (r *rig) restless(t testing.TB, n *node) *guest {
	return r.small(t, n, "--only", "regs,sync,timers,shapes", "--without", "guards", "--threads", "2", "--pace", "1")
}

// inRounds chooses from what a side has passed until last: what comes before the
// sample once, and then each point in the sample and in one of three rounds.
func inRounds(s side, passed []string, first, last string) []moment {
	from := slices.Index(passed, first)
	if from < 0 {
		return nil
	}
	begin := map[side]int{source: 1 + looksBefore, destination: 1}[s]
	round, seen := 1, map[moment]bool{}
	var out []moment
	for i, p := range passed {
		if p == last {
			break
		}
		m := moment{s, p, 1, round}
		later := begin + 1 + len(p)%3
		if i >= from && !seen[m] && (round == begin || round == later && !strings.HasPrefix(p, "inject/") || round == 1) {
			seen[m] = true
			out = append(out, m)
		}
		if p == roundEnds[s] {
			round++
		}
	}
	return out
}

// Either daemon is killed in every round.
func TestKilledInRounds(t *testing.T) {
	begin(t)
	k := newKiller(t, (*rig).restless)
	passed := k.look(endless)
	all := append(inRounds(source, passed[source], "source/engine/track/before", "source/send/abort/before"),
		inRounds(destination, passed[destination], "destination/recv/land", "destination/recv/abort")...)
	most := map[side]int{}
	for _, m := range all {
		most[m.side] = max(most[m.side], m.round)
	}
	if most[source] < 4+looksBefore || most[destination] < 4 {
		t.Fatalf("not three rounds: %v", all)
	}
	for _, m := range all {
		k.kill(endless, m)
	}
	k.end()
}
