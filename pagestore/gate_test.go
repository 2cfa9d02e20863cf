package pagestore

import (
	"runtime"
	"sync"
	"testing"
	"time"
)

// TestGate: whoever is inside as a writer is alone, and nobody is left asleep.
func TestGate(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(16)) // as many as threads, as sys.FutexWait asks for
	var g gate
	var a, b int // equal whenever nobody writes
	var wg sync.WaitGroup
	end := time.Now().Add(300 * time.Millisecond)
	turns := make([]int, 8)
	for i := range turns {
		wg.Go(func() {
			if i%2 == 0 {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
			}
			for time.Now().Before(end) {
				if i < 2 {
					g.Lock()
					a++
					for range 50 * i {
						runtime.Gosched()
					}
					b++
					g.Unlock()
				} else {
					g.RLock()
					if a != b {
						t.Errorf("%d and %d while inside", a, b)
					}
					if turns[i]%64 == 0 {
						time.Sleep(20 * time.Microsecond) // longer than anybody spins
					}
					g.RUnlock()
				}
				turns[i]++
			}
		})
	}
	wg.Wait()
	for i, n := range turns {
		if n == 0 {
			t.Errorf("thread %d never got in", i)
		}
	}
	if s := g.state.Load(); s&^gateSleeps != 0 {
		t.Errorf("at the end the state is %#x", s)
	}
}
