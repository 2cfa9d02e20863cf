package dirtytest

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/proc"
)

// Config says how long Run goes on. The zero value is for every day.
type Config struct {
	Seed   uint64 // 0: by the clock
	Rounds int    // looks while the program runs; 0: 12
	Steps  int    // changes of the mappings before each; 0: 12
}

// Run lets a program change all that it can while track looks, and returns how
// the shadow differs from its memory in the end.
func Run(t testing.TB, p *Program, track dirty.Tracker, c Config) error {
	t.Helper()
	if c.Seed == 0 {
		c.Seed = uint64(time.Now().UnixNano())
	}
	if c.Rounds == 0 {
		c.Rounds = 12
	}
	if c.Steps == 0 {
		c.Steps = 12
	}
	t.Logf("seed %d", c.Seed)
	rnd := rand.New(rand.NewPCG(c.Seed, 1))
	for _, op := range []string{"mmap", "thp", "file", "shared", "memfd", "mempriv", "brk", "read"} {
		p.Do("do %s %d", op, rnd.Uint64()>>1)
	}
	s := NewShadow(t, p.Pid(), track)
	p.Do("churn 2")
	did := map[string]int{}
	steps := func() {
		for range c.Steps {
			did[p.Do("step %d", rnd.Uint64()>>1)]++
		}
	}
	for range c.Rounds {
		steps()
		// While it looks the program goes on.
		more := make(chan error, 1)
		n := rnd.IntN(6)
		var seeds []uint64
		for range n {
			seeds = append(seeds, rnd.Uint64()>>1)
		}
		go func() {
			for _, seed := range seeds {
				if _, err := p.do(fmt.Sprintf("step %d", seed)); err != nil {
					more <- err
					return
				}
			}
			more <- nil
		}()
		s.Round()
		if err := <-more; err != nil {
			t.Fatal(err)
		}
	}
	steps()
	resume, err := p.Stop()
	if err != nil {
		t.Fatal(err)
	}
	last := s.Last()
	if err = s.Diff(); err == nil {
		s.Round() // whoever goes on after all has lost nothing
		err = s.Diff()
	}
	t.Logf("%d pages read in %d rounds; in the end %d private, %d shared; %v", s.Read, c.Rounds+1,
		last.Content.Pages(), last.Shared.Content.Pages(), did)
	if rerr := resume(); rerr != nil {
		t.Error(rerr)
	}
	return err
}

// Maps are the program's mappings now.
func (p *Program) Maps() []proc.Mapping {
	p.t.Helper()
	maps, err := proc.ReadMaps(p.Pid())
	if err != nil {
		p.t.Fatal(err)
	}
	return maps
}
