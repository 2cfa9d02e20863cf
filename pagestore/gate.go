package pagestore

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
)

// gate is a sync.RWMutex for threads of their own. Placing holds it for some
// microseconds, again and again on every bulk lane, and the thread that reads
// faults has to get in between for each of them. A goroutine that is locked to its
// thread and waits for a sync.RWMutex costs four switches of threads; here it
// costs one, and none where the wait is short.
type gate struct {
	writer sync.Mutex    // one at a time
	state  atomic.Uint32 // how many are inside, and the bits below
}

const (
	gateShut   = 1 << 31 // a writer is inside, or waits for those who are
	gateSleeps = 1 << 30 // somebody sleeps until it changes
	gateInside = gateSleeps - 1
	// gateSpins is some microseconds: what placing a slice takes.
	gateSpins = 200
	// gateNap bounds one sleep: it keeps a processor of the scheduler.
	gateNap = time.Millisecond
)

func (g *gate) Lock() {
	g.writer.Lock()
	g.state.Or(gateShut)
	g.await(gateInside)
}

func (g *gate) Unlock() {
	if g.state.And(^uint32(gateShut|gateSleeps))&gateSleeps != 0 {
		sys.FutexWake(&g.state)
	}
	g.writer.Unlock()
}

func (g *gate) RLock() {
	for {
		s := g.await(gateShut)
		if g.state.CompareAndSwap(s, s+1) {
			return
		}
	}
}

func (g *gate) RUnlock() {
	if s := g.state.Add(^uint32(0)); s&gateInside == 0 && s&gateSleeps != 0 {
		sys.FutexWake(&g.state)
	}
}

// await returns the state once none of bits is set in it.
func (g *gate) await(bits uint32) uint32 {
	for n := 0; ; n++ {
		s := g.state.Load()
		switch {
		case s&bits == 0:
			return s
		case n < gateSpins:
		case s&gateSleeps != 0 || g.state.CompareAndSwap(s, s|gateSleeps):
			sys.FutexWait(&g.state, s|gateSleeps, gateNap)
		}
	}
}
