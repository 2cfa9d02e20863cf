package migrate

import (
	"context"
	"fmt"
	"time"
)

// whileListening runs f, passes the rest of the memory map on to it, reports how
// far the pages are, and cancels f when the source aborts.
func (a *arriving) whileListening(ctx context.Context, c *control, rest chan<- []Memory, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan struct{})
	var err error
	go func() {
		defer close(done)
		err = f(ctx)
	}()
	defer func() { cancel(nil); <-done }()
	tick := time.NewTicker(a.d.t.Progress)
	defer tick.Stop()
	in := c.in
	for {
		select {
		case <-done:
			return err
		case <-tick.C:
			st := a.refresh()
			a.tell("")
			_ = c.send(progressMsg{Stats: st.onAir()}) // a lost connection ends ctx
		case r := <-in:
			why := fmt.Errorf("%w: %v while rebuilding", ErrProtocol, r.msg.kind())
			switch m := r.msg.(type) {
			case *abortMsg:
				why = fmt.Errorf("aborted by the source: %s", m.Reason)
			case *memoryMsg:
				if rest == nil {
					break // it came already
				}
				a.d.kill("recv/memory")
				var mem []Memory
				if mem, why = decodeMemory(r.blobs[0]); why == nil {
					rest <- mem // has room for it
					rest = nil
					continue
				}
			}
			cancel(why)
			<-done
			return why
		}
	}
}
