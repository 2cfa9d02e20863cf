package survive_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
)

// endless is a pre-copy that does not come to its switch: a restless program
// writes more than the link carries in the downtime that is allowed. It goes
// through some rounds and gives up.
var endless = script{name: "rounds", run: func(g *guest, _ string) error {
	_, err := g.begin(g.endless())
	return err
}}

func (g *guest) endless() appliance.MigrateRequest {
	req := g.request("precopy")
	req.MaxDowntimeMS, req.MaxBandwidth = 25, "300Mbit"
	return req
}

// restless is small, and writes all the time.
func (r *rig) restless(t testing.TB, n *node) *guest {
	return r.small(t, n, "--only", "regs,sync,timers,shapes", "--without", "guards", "--threads", "2", "--pace", "1")
}

// inRounds chooses from what a side has passed until last: what comes before the
// first round once, and then each point in the first round and in one of the next.
func inRounds(s side, passed []string, first, last string) []moment {
	from := slices.Index(passed, first)
	if from < 0 {
		return nil
	}
	begin := map[side]int{source: 4, destination: 1}[s]
	round, seen := 1, map[moment]bool{}
	var out []moment
	for i, p := range passed {
		if p == last {
			break
		}
		m := moment{s, p, 1, round}
		later := begin + 1 + len(p)%2
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
	if most[source] < 6 || most[destination] < 3 {
		t.Fatalf("not three rounds: %v", all)
	}
	for _, m := range all {
		k.kill(endless, m)
	}
	k.end()
}
