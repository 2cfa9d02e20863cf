package survive_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// killer runs kills on rigs of its own, side by side: most of a migration is
// waiting.
type killer struct {
	t    *testing.T
	make func() *guest
	free chan *guest
	wg   sync.WaitGroup
	n    int

	missed atomic.Int32 // kills that did not come about
}

const rigs = 2

func newKiller(t *testing.T, launch func(*rig, testing.TB, *node) *guest) *killer {
	k := &killer{t: t, free: make(chan *guest, rigs)}
	k.make = func() *guest {
		r := newRig(k.t)
		return launch(r, k.t, r.a)
	}
	for range rigs {
		k.free <- k.make()
	}
	return k
}

// still writes little.
func still(r *rig, t testing.TB, n *node) *guest { return r.small(t, n) }

// kill has a guest go through a script in which ms happen.
func (k *killer) kill(sc script, ms ...moment) {
	g := <-k.free
	k.n++
	mode := modes[k.n%len(modes)]
	k.wg.Go(func() {
		ok := k.t.Run(fmt.Sprintf("%s/%v", sc.name, ms), func(t *testing.T) {
			g.t = t
			g.r.watch(t)
			if !g.killAt(t, sc, mode, ms...) {
				k.missed.Add(1)
			}
		})
		g.t = k.t
		if !ok {
			g.end()
			g = k.make()
		}
		k.free <- g
	})
}

// look has a guest go through a script to see what is passed.
func (k *killer) look(sc script, ms ...moment) map[side][]string {
	g := <-k.free
	defer func() { k.free <- g }()
	return g.trace(k.t, sc, "postcopy", ms...)
}

// end lets the guests check themselves.
func (k *killer) end() {
	k.wg.Wait()
	if m := int(k.missed.Load()); m > 2+k.n/10 {
		k.t.Errorf("%d of %d kills did not come about", m, k.n)
	}
	for range rigs {
		g := <-k.free
		g.verify()
		g.r.clean(k.t)
	}
}
