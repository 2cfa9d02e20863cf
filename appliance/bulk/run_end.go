package bulk

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// late gives up what its group's deadline has passed for, and reports whether there was any.
func (c *coordinator) late(ctx context.Context, now time.Time) (any bool, err error) {
	for _, i := range c.all() {
		d := c.File.DeadlineOf(c.File.group(i.Group))
		if i.State != Waiting || d == 0 || now.Sub(c.began) <= d {
			continue
		}
		i.State, i.Reason, any = Failed, fmt.Sprintf("not begun: the deadline of group %s, %v, has passed", i.Group, d), true
		if err := c.change(ctx, i); err != nil {
			return any, err
		}
	}
	if any {
		err = c.place(ctx)
	}
	return any, err
}

// giveUp says of what still waits why it did not begin.
func (c *coordinator) giveUp(ctx context.Context) error {
	for _, i := range c.all() {
		if i.State != Waiting {
			continue
		}
		if i.State, i.Reason = Failed, "not begun: "+c.stopping; c.stopping == "" {
			i.Reason = "not begun: " + c.sched.Waits(i.ID())
		}
		if err := c.change(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// bandwidth is what the page lanes of an item may take: its group's limit, and its part of
// the budget.
func (c *coordinator) bandwidth(i *Item) string {
	most := c.File.group(i.Group).MaxBandwidth
	if c.File.BudgetBytes() == 0 {
		return most
	}
	part := c.File.BudgetBytes() / float64(c.File.atOnce())
	if own, _ := appliance.ParseBandwidth(most); own > 0 && float64(own) < part { // Load has seen it
		return most
	}
	return fmt.Sprintf("%.0fbit", 8*part)
}

// bringBack moves back what this run has moved, the last first.
func (c *coordinator) bringBack(ctx context.Context) error {
	for _, id := range slices.Backward(c.moved) {
		i := *c.items[id]
		back := Item{Host: i.To, PID: i.DestPID, Command: i.Command, Group: i.Group, To: i.Host, State: Moving, Migration: newID()}
		over := c.hosts.carry(ctx, back, c.bandwidth(&i), func(appliance.Report) {})
		if over.State == Moving {
			return context.Cause(ctx)
		}
		i.Reason = "brought back, as others could not be moved"
		if i.State = Returned; over.State != Done {
			i.State, i.Reason = Done, fmt.Sprintf("could not be brought back: %s: %s", over.State, over.Reason)
		}
		if err := c.change(ctx, i); err != nil {
			return err
		}
	}
	return nil
}
