package bulk

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/plan/fleet"
)

// Config is a run. File and Store are required.
type Config struct {
	File  *File
	Store Store
	Log   *slog.Logger // nil discards
	// OnChange, if set, is called with an item whenever its state has changed, and
	// OnProgress with the report of a migration that goes on. They must not block.
	OnChange   func(Item)
	OnProgress func(Item, appliance.Report)
}

// coordinator carries out a run. All of it is one goroutine's but for told.
type coordinator struct {
	Config
	hosts    *hosts
	items    map[string]*Item
	running  map[string]*appliance.Report // the last that was heard
	sched    *fleet.Schedule
	told     chan news
	after    map[string]time.Time // before which an item is not tried again
	moved    []string             // in this run
	stopping string               // why nothing begins any more
	// returning: and what has moved is brought back.
	returning bool
	began     time.Time
}

// news is what a migration's goroutine tells: what has become of the item, or how far it is.
type news struct {
	item   Item
	report *appliance.Report // nil where it is over
}

// Run carries out a run, or carries it on, until nothing is left that it could do. The
// items say what has become of each process. It fails where it could not begin, or its
// store fails; with the end of ctx it returns that error and what is known.
func Run(ctx context.Context, cfg Config) ([]Item, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	h, err := openHosts(cfg.File)
	if err != nil {
		return nil, err
	}
	defer h.close()
	c := &coordinator{Config: cfg, hosts: h, items: map[string]*Item{}, running: map[string]*appliance.Report{},
		told: make(chan news), after: map[string]time.Time{}, began: time.Now()}
	inner, cancel := context.WithCancel(ctx)
	defer c.drain() // whoever follows a migration ends with inner
	defer cancel()
	if err := c.takeUp(inner); err != nil {
		return nil, err
	}
	err = c.loop(inner)
	if err == nil && c.returning {
		err = c.bringBack(inner)
	}
	return c.all(), err
}

// drain waits for those that follow a migration.
func (c *coordinator) drain() {
	for len(c.running) > 0 {
		if n := <-c.told; n.report == nil {
			delete(c.running, n.item.ID())
		}
	}
}

// all are the items, in order of their ids.
func (c *coordinator) all() []Item {
	out := make([]Item, 0, len(c.items))
	for _, i := range c.items {
		out = append(out, *i)
	}
	slices.SortFunc(out, func(a, b Item) int { return strings.Compare(a.ID(), b.ID()) })
	return out
}

// takeUp finds what there is to do: what an earlier coordinator has begun, and what the
// groups select now.
func (c *coordinator) takeUp(ctx context.Context) error {
	before, err := c.Store.Items(ctx)
	if err != nil {
		return err
	}
	now, err := c.hosts.survey(ctx)
	if err != nil {
		return err
	}
	for _, i := range before {
		c.items[i.ID()] = &i
	}
	for _, i := range now {
		if old := c.items[i.ID()]; old == nil || old.State != Moving {
			if err := c.change(ctx, i); err != nil {
				return err
			}
		}
	}
	selected := map[string]bool{}
	for _, i := range now {
		selected[i.ID()] = true
	}
	for id, i := range c.items {
		switch {
		case i.State == Moving:
			if err := c.Store.Hold(ctx, id); err != nil {
				return err
			}
			c.begin(ctx, *i)
		case selected[id], i.State.over():
		default: // it was to move, and nobody selects it any more
			gone := *i
			gone.State, gone.Reason = Gone, "it has ended, or nothing selects it any more"
			if err := c.change(ctx, gone); err != nil {
				return err
			}
		}
	}
	return c.place(ctx)
}

// place decides anew where those go that wait, and in which order.
func (c *coordinator) place(ctx context.Context) error {
	f := c.File.fleet(c.all())
	if err := f.Validate(); err != nil {
		return err
	}
	p := fleet.Place(f)
	to := map[string]string{}
	for id, i := range c.items {
		if i.State == Moving {
			to[id] = i.To
		}
		if i.State != Waiting {
			continue
		}
		next := *i
		if next.To = p.To[id]; next.To == "" {
			next.State, next.Reason = Refused, p.Refused[id]
			if i.Reason != "" {
				next.Reason += "; " + i.Reason
			}
			if err := c.change(ctx, next); err != nil {
				return err
			}
			continue
		}
		to[id] = next.To
		*i = next
	}
	sched, err := fleet.NewSchedule(f, to)
	if err != nil {
		return err
	}
	for id, i := range c.items {
		if i.State == Moving {
			sched.Begin(id)
		}
	}
	c.sched = sched
	return nil
}

// change keeps an item, and then goes by it.
func (c *coordinator) change(ctx context.Context, i Item) error {
	i.Changed = time.Now()
	// What is known is kept also when the run is being ended.
	if err := c.Store.Put(context.WithoutCancel(ctx), i); err != nil {
		return err
	}
	c.items[i.ID()] = &i
	if c.OnChange != nil {
		c.OnChange(i)
	}
	return nil
}

// loop begins what may begin, until nothing moves and nothing waits that could.
func (c *coordinator) loop(ctx context.Context) error {
	for {
		wake, err := c.beginAll(ctx)
		if err != nil {
			return err
		}
		if len(c.running) == 0 && (wake.IsZero() || c.stopping != "") {
			return c.giveUp(ctx)
		}
		var timer <-chan time.Time
		if !wake.IsZero() {
			timer = time.After(time.Until(wake))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer:
		case n := <-c.told:
			if err := c.hear(ctx, n); err != nil {
				return err
			}
		}
	}
}

// beginAll begins all that may, and says when to look again where something only waits for
// the time to pass.
func (c *coordinator) beginAll(ctx context.Context) (wake time.Time, err error) {
	now := time.Now()
	later := func(t time.Time) {
		if wake.IsZero() || t.Before(wake) {
			wake = t
		}
	}
	if d := c.File.DeadlineOf(nil); c.stopping == "" && d > 0 && now.Sub(c.began) > d {
		c.stopping = fmt.Sprintf("the run's deadline of %v has passed", d)
	}
	if c.stopping != "" || c.sched.Left() == 0 {
		return wake, nil
	}
	if w := c.File.Window; w != nil {
		if open, next := w.Open(now); !open {
			return next, nil
		}
	}
	if late, err := c.late(ctx, now); err != nil || late {
		return now, err
	}
	for _, id := range c.sched.Next() {
		if t := c.after[id]; t.After(now) {
			later(t)
			continue
		}
		i := *c.items[id]
		i.Reason = ""
		if err := c.Store.Hold(ctx, id); err != nil {
			if !errors.Is(err, ErrHeld) {
				return wake, err
			}
			c.after[id] = now.Add(time.Second)
			later(c.after[id])
			continue
		}
		i.State, i.Migration = Moving, newID()
		i.Attempts++
		if err := c.change(ctx, i); err != nil {
			return wake, err
		}
		c.sched.Begin(id)
		c.begin(ctx, i)
	}
	return wake, nil
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// begin has an item followed that counts as moving.
func (c *coordinator) begin(ctx context.Context, i Item) {
	c.running[i.ID()] = &appliance.Report{}
	go func() {
		over := c.hosts.carry(ctx, i, c.bandwidth(&i), func(r appliance.Report) { c.told <- news{i, &r} })
		c.told <- news{over, nil}
	}()
}

// retryAfter is how long a process is left alone after its first failure; twice that after
// the second, and so on.
const retryAfter = time.Second

// hear takes news.
func (c *coordinator) hear(ctx context.Context, n news) error {
	id := n.item.ID()
	if n.report != nil {
		c.running[id] = n.report
		if c.OnProgress != nil {
			c.OnProgress(n.item, *n.report)
		}
		return nil
	}
	delete(c.running, id)
	i := n.item
	if i.State == Moving { // the run is being ended
		return nil
	}
	g := c.File.group(i.Group)
	again := false
	switch {
	case i.State == Done:
		c.moved = append(c.moved, id)
	case i.State == Waiting: // its daemon knows nothing of it
		again = true
	case i.State == Refused && i.To != "":
		i.Full = append(i.Full, i.To)
		for _, to := range c.File.Destinations(g) {
			again = again || to != i.Host && !slices.Contains(i.Full, to)
		}
	case i.State == Failed:
		again = i.Attempts <= c.File.RetriesOf(g)
		c.after[id] = time.Now().Add(retryAfter * time.Duration(i.Attempts))
	}
	if again && c.stopping == "" {
		i.State = Waiting
	}
	if err := c.change(ctx, i); err != nil {
		return err
	}
	if err := c.Store.Drop(ctx, id); err != nil {
		return err
	}
	if i.State == Waiting {
		return c.place(ctx)
	}
	c.sched.End(id, i.State == Done)
	if on := c.File.OnFailureOf(g); on != OnFailureContinue && (i.State == Failed || i.State == Refused || i.State == InDoubt) && c.stopping == "" {
		c.stopping = fmt.Sprintf("%v: %s", &i, i.State)
		c.returning = on == OnFailureReturn
	}
	return nil
}
