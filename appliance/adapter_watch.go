package appliance

import (
	"context"
	"errors"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
)

// watch follows a pager's events until it or the client is gone, and puts
// another in its place if it died before its time.
func (a *arrival) watch(p *pager.Client) {
	for ev := range p.Events() {
		a.mu.Lock()
		if ev.Stats.PagesTotal != 0 {
			a.stats = ev.Stats
		}
		a.mu.Unlock()
		switch ev.Kind {
		case pager.LaneLost:
			a.log.Warn("page lane lost", "lane", ev.Lane.Kind, "index", ev.Lane.Index, "err", ev.Err)
		case pager.Exited:
			a.mu.Lock()
			gone := a.done || a.pager != p
			a.mu.Unlock()
			if gone {
				return
			}
			a.log.Warn("pager has died, another takes over", "err", ev.Err)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			if err := a.reachPager(ctx); err != nil {
				a.log.Error("no pager could take over; the process waits at its next missing page", "err", err)
			}
			cancel()
			return
		}
	}
}

// current is the pager of the moment.
func (a *arrival) current() *pager.Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pager
}

// complete reports whether every page is here and the pager was told to end.
func (a *arrival) complete() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.record.Resident
}

// retry runs f on the pager, and again on the one that takes over when it dies.
// Once every page is here there is nothing to do: no pager comes after the last.
func (a *arrival) retry(ctx context.Context, f func(p *pager.Client) error) error {
	for {
		p := a.current()
		if p == nil { // an earlier daemon saw the last page arrive
			return nil
		}
		err := f(p)
		if !errors.Is(err, pager.ErrGone) {
			return err
		}
		if a.complete() {
			return nil
		}
		deadline := time.NewTimer(30 * time.Second)
		for a.current() == p {
			if a.complete() {
				deadline.Stop()
				return nil
			}
			select {
			case <-ctx.Done():
				deadline.Stop()
				return ctx.Err()
			case <-deadline.C:
				return err
			case <-time.After(10 * time.Millisecond):
			}
		}
		deadline.Stop()
	}
}
