package dirty

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/proc"
)

const (
	// mostWalkers is how many processors walk page tables at once. Two take half the
	// time of one; the process and what else copies it need some too.
	mostWalkers = 2
	// walkerRuns is from how many runs on it pays to begin another.
	walkerRuns = 4
)

// walkers walk the page tables of one process together. Each has a descriptor of
// its own, for a Pagemap is not for concurrent use.
type walkers struct {
	pid int
	pms []*proc.Pagemap // one at least
}

// each calls f for 0 to n-1, in any order, and returns when all calls have. After an
// error it begins no more of them.
func (w *walkers) each(n int, f func(pm *proc.Pagemap, i int) error) error {
	want := min(mostWalkers, runtime.GOMAXPROCS(0), n/walkerRuns)
	for len(w.pms) < want {
		pm, err := proc.OpenPagemap(w.pid)
		if err != nil {
			return err
		}
		w.pms = append(w.pms, pm)
	}
	var next atomic.Int64
	walk := func(pm *proc.Pagemap) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= n {
				return nil
			}
			if err := f(pm, i); err != nil {
				next.Store(int64(n))
				return err
			}
		}
	}
	errs := make([]error, max(1, want))
	var others sync.WaitGroup
	for k := 1; k < want; k++ {
		others.Go(func() { errs[k] = walk(w.pms[k]) })
	}
	errs[0] = walk(w.pms[0])
	others.Wait()
	return errors.Join(errs...)
}

func (w *walkers) close() error {
	var errs []error
	for _, pm := range w.pms {
		errs = append(errs, pm.Close())
	}
	return errors.Join(errs...)
}
