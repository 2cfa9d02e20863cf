package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/migrate/stream"
)

// watch follows a pager's events until it or the client is gone, and puts
// another in its place if it died before its time.
func (a *arrival) watch(p *pager.Client) {
	for ev := range p.Events() {
		a.mu.Lock()
		if ev.Stats.PagesTotal+ev.Stats.PagesLanded != 0 && !a.record.Gone { // what is poisoned counts as resident
			a.stats = ev.Stats
		}
		a.mu.Unlock()
		switch ev.Kind {
		case pager.LaneLost:
			a.log.Warn("page lane lost", "lane", ev.Lane.Kind, "index", ev.Lane.Index, "err", ev.Err)
			if errors.Is(ev.Err, stream.ErrGone) {
				go a.sourceGone(ev.Err)
			}
		case pager.Exited:
			a.mu.Lock()
			over := a.done || a.pager != p || ev.Err == nil // nil: it was told to end
			a.mu.Unlock()
			if over {
				return
			}
			a.log.Debug("the connection to the pager has ended", "err", ev.Err)
			a.replace(p)
			return
		}
	}
}

// replace puts another in the place of a dead pager, however often that fails: nobody else
// does it but who asks something of the pager, and the process may stand still meanwhile,
// stopped by the one that died.
func (a *arrival) replace(dead *pager.Client) {
	for pause := takeoverPause; ; pause = min(2*pause, takeoverLimit) {
		err := a.revive(context.Background(), dead)
		if err == nil || errors.Is(err, errEnded) || errors.Is(err, migrate.ErrGone) {
			return
		}
		a.log.Error("no pager could take over yet; the process waits at its next missing page", "err", err)
		time.Sleep(pause)
	}
}

// takeoverPause is how long is waited after the first attempt that failed.
const takeoverPause = 20 * time.Millisecond

// takeoverLimit bounds one attempt to replace a pager.
const takeoverLimit = 30 * time.Second

var errEnded = errors.New("the arrival has ended")

// revive sees to it that there is a pager in the place of dead, which may be nil.
func (a *arrival) revive(ctx context.Context, dead *pager.Client) error {
	ctx, cancel := context.WithTimeout(ctx, takeoverLimit)
	defer cancel()
	a.revival.Lock()
	defer a.revival.Unlock()
	a.mu.Lock()
	over, done, lost := a.pager != dead, a.done, a.record.Lost
	resident := a.record.Resident || a.record.Free
	a.mu.Unlock()
	switch {
	case done:
		return errEnded
	case lost:
		return errLost
	case over: // somebody was faster
		return nil
	}
	p, err := a.reachPager(ctx)
	switch {
	case err == nil:
	case resident && (errors.Is(err, os.ErrNotExist) || errors.Is(err, pager.ErrNoKeeper)):
		// It had let go of the process already, and only its keeper may be left.
		err = pager.Abandoned(a.dir)
		if dead != nil {
			err = errors.Join(err, dead.Abort(ctx))
		}
		if err != nil {
			return err
		}
	case errors.Is(err, pager.ErrNoKeeper):
		return a.lose(ctx, err)
	default:
		return fmt.Errorf("pager: %w", err)
	}
	a.mu.Lock()
	a.pager, a.another, done = p, true, a.done
	a.mu.Unlock()
	switch {
	case p == nil:
		if err := a.unkeep(); err != nil { // nobody is left who could show anything
			return err
		}
	case done: // meanwhile
		return errors.Join(errEnded, p.Close())
	default:
		go a.watch(p)
	}
	return nil
}

// errLost: what was missing reads as zeros.
var errLost = fmt.Errorf("%w: pager and keeper have ended before all pages were here", migrate.ErrGone)

// lose ends a process that would work with zeros for what was missing. One that
// was not released yet never will be.
func (a *arrival) lose(ctx context.Context, why error) error {
	a.mu.Lock()
	a.record.Lost = true
	err := a.saveRecord()
	released := a.record.Released
	a.mu.Unlock()
	a.log.Error("the process is ended: what was missing is lost", "err", why)
	if released {
		err = errors.Join(err, a.end(ctx))
	}
	return errors.Join(errLost, why, err)
}

// reachPager connects to the living pager, or makes a new one in the place of a
// dead one.
func (a *arrival) reachPager(ctx context.Context) (*pager.Client, error) {
	p, err := pager.Connect(ctx, a.pagerConfig())
	if errors.Is(err, pager.ErrNoPager) {
		a.said = pager.LastWords(a.dir)
		a.log.Warn("pager has died, another takes over", "err", err, "said", a.said)
		p, err = pager.Takeover(ctx, a.pagerConfig(), 0)
	}
	return p, err
}

// lander is the pager for a round, and whether it is another than at the beginning.
func (a *arrival) lander() (p *pager.Client, another bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pager, a.another
}

// died is err, of a pager that died in a round, with what it said last. Whoever
// puts another in its place has noted that, for the log is the next one's then.
func (a *arrival) died(p *pager.Client, err error) error {
	a.revival.Lock()
	defer a.revival.Unlock()
	said := a.said
	if a.current() == p {
		said = pager.LastWords(a.dir)
	}
	a.log.Warn("pager has died in a round of pre-copy", "err", err, "said", said)
	if said, _, _ = strings.Cut(said, "\n"); said == "" {
		said = "nothing: it was killed, for want of memory for example (the kernel's log says so)"
	}
	return fmt.Errorf("the destination's pager has died: %w; it said last: %s", err, said)
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
// Without a pager there is nothing to do: all pages have arrived.
func (a *arrival) retry(ctx context.Context, f func(p *pager.Client) error) error {
	for {
		p := a.current()
		if p == nil {
			return nil
		}
		err := f(p)
		if !errors.Is(err, pager.ErrGone) {
			return err
		}
		if rerr := a.revive(ctx, p); rerr != nil {
			return errors.Join(rerr, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}
