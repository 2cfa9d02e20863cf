package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/migrate"
)

const (
	// drainLimit is how long the other lanes may take to bring what the source
	// had sent before its copy ended.
	drainLimit  = 3 * time.Second
	drainPeriod = 50 * time.Millisecond
	// goneLimit bounds the whole of it.
	goneLimit = 30 * time.Second
)

// sourceGone is called when the source has said on a page lane that its copy has
// ended, which no broken link and no restarted daemon looks like. What is missing
// now will never come: threads that wait for it, and those that will, get SIGBUS.
// Before the process is let run nothing is decided here: the source aborts, or
// says it again on the lanes of the next epoch.
func (a *arrival) sourceGone(why error) {
	ctx, cancel := context.WithTimeout(context.Background(), goneLimit)
	defer cancel()
	a.mu.Lock()
	over := a.done || a.record.Gone || a.record.Lost || a.record.Resident || !a.record.Released
	a.mu.Unlock()
	if over {
		return
	}
	st, err := a.drained(ctx)
	if err != nil {
		a.log.Warn("the source's copy is gone; asking the pager what is missing", "err", err)
		return // it is said again on the lanes of the next epoch
	}
	if st.PagesResident >= st.PagesTotal {
		return // what was refused came by another lane
	}
	a.mu.Lock()
	if a.done || a.record.Gone || a.record.Lost || a.record.Resident {
		a.mu.Unlock()
		return
	}
	a.record.Gone = true
	a.stats = st
	err = a.saveRecord()
	a.mu.Unlock()
	a.log.Error("the source's copy has ended; pages that are missing raise SIGBUS from now on",
		"missing", st.PagesTotal-st.PagesResident, "pages", st.PagesTotal, "source", why, "err", err)
	if err := a.poison(ctx); err != nil {
		a.log.Error("missing pages not poisoned", "err", a.endPoisoned(ctx, err))
	}
}

// filesGone notes that the source's copy has ended before its files were settled: what is
// mapped of them and not in the page cache raises SIGBUS.
func (a *arrival) filesGone(why error) {
	a.mu.Lock()
	a.record.Gone = true
	err := a.saveRecord()
	a.mu.Unlock()
	a.log.Error("the source's copy has ended; files that it has mapped are lost in part", "why", why, "err", err)
}

// drained waits until every lane has ended, and with it brought what was on its
// way, and returns what there is then.
func (a *arrival) drained(ctx context.Context) (st pager.Stats, err error) {
	tick := time.NewTicker(drainPeriod)
	defer tick.Stop()
	for begin := time.Now(); ; {
		err = a.retry(ctx, func(p *pager.Client) (err error) {
			st, err = p.Stats(ctx)
			return err
		})
		if err != nil || st.Lanes == 0 || time.Since(begin) > drainLimit {
			return st, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return st, context.Cause(ctx)
		}
	}
}

func (a *arrival) poison(ctx context.Context) error {
	return a.retry(ctx, func(p *pager.Client) error { return p.Poison(ctx) })
}

// endPoisoned ends a process whose missing pages could not be poisoned: it would
// wait for them for ever.
func (a *arrival) endPoisoned(ctx context.Context, why error) error {
	if errors.Is(why, migrate.ErrGone) || errors.Is(why, errEnded) || ctx.Err() != nil {
		return why
	}
	if a.skeleton != nil {
		if err := a.end(ctx); err != nil {
			return errors.Join(why, err)
		}
	}
	if p := a.current(); p != nil {
		if err := p.Abort(ctx); err != nil {
			return errors.Join(why, err)
		}
	}
	return fmt.Errorf("%w; the process was ended for it: %w", errSourceGone, why)
}

// errSourceGone: the process has a part of its memory and can have no more.
var errSourceGone = fmt.Errorf("%w: the source's copy ended before all pages were here", migrate.ErrGone)

func (a *arrival) gone() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.record.Gone
}

// sound returns an error where the process has not all of its memory.
func (a *arrival) sound() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.record.Gone {
		return nil
	}
	if n := a.stats.PagesTotal - a.stats.PagesResident; n != 0 {
		return fmt.Errorf("%w: %d of %d pages are missing, and touching one of them raises SIGBUS", errSourceGone, n, a.stats.PagesTotal)
	}
	return fmt.Errorf("%w: touching one that is missing, of a file that was mapped, raises SIGBUS", errSourceGone)
}
