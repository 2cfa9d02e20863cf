package stream

import (
	"runtime"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// TestTakeUnderAnyThread: whoever serves faults owns its thread and takes from
// the same order as goroutines that do not.
func TestTakeUnderAnyThread(t *testing.T) {
	s := newSetup(t, []int{100, 60}, func(*FetcherConfig) {})
	s.fetch.Start(true)
	got := map[*pagestore.Source]*page.Set{s.st.Source(0): {}, s.st.Source(1): {}}
	for i := 0; ; i++ {
		type taken struct {
			src *pagestore.Source
			rs  []page.Range
		}
		done := make(chan taken)
		go func() {
			if i%2 == 1 {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
			}
			src, rs := s.fetch.take(7)
			done <- taken{src, rs}
		}()
		next := <-done
		if next.rs == nil {
			break
		}
		for _, r := range next.rs {
			got[next.src].Add(r)
		}
	}
	for src, set := range got {
		if int(set.Pages()) != src.Len() {
			t.Errorf("%d pages taken, want %d", set.Pages(), src.Len())
		}
	}
}
