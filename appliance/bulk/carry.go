package bulk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// Waits between questions to a daemon that does not answer, and for how long it is asked.
const (
	askAgain   = 500 * time.Millisecond
	askForLong = 2 * time.Minute
)

// carry asks for an item's migration and follows it to its end, whatever happens to the
// daemons meanwhile. The item that it returns is Waiting where nothing of it is known to
// anybody and the process is where it was, and still Moving where ctx has ended.
func (h *hosts) carry(ctx context.Context, i Item, bandwidth string, on func(appliance.Report)) Item {
	source := h.clients[i.Host]
	silent := time.Now() // since when nobody has answered
	req := h.request(&i, bandwidth)
	for {
		// By its id the same request is carried out once, so it can be made again.
		_, err := source.Migrate(ctx, req)
		if err == nil {
			var rep appliance.Report
			rep, err = source.Watch(ctx, i.Migration, func(r appliance.Report) {
				if silent = time.Now(); !r.Finished() {
					on(r)
				}
			})
			if err == nil {
				i.take(&rep)
				return h.ended(ctx, i)
			}
		}
		if ctx.Err() != nil {
			return i
		}
		if api := (*appliance.APIError)(nil); errors.As(err, &api) {
			i.State, i.Reason = Refused, api.Message
			if api.Kind == appliance.KindFailed {
				i.State = Failed
			}
			return h.ended(ctx, i)
		}
		// The daemon is not there, or was not for a moment.
		over, known := h.ask(ctx, i)
		switch {
		case ctx.Err() != nil:
			return i
		case known:
			return over
		case time.Since(silent) > askForLong:
			i.State, i.Reason = InDoubt, fmt.Sprintf("host %s does not answer: %v; run it again when it does", i.Host, err)
			return i
		}
		select {
		case <-ctx.Done():
			return i
		case <-time.After(askAgain):
		}
	}
}

// ask asks both hosts what has become of a migration whose source's daemon was away, and
// reports whether that is known. It is not where that daemon carries it on, or is still
// away.
func (h *hosts) ask(ctx context.Context, i Item) (_ Item, known bool) {
	rep, err := h.clients[i.Host].Show(ctx, i.Migration)
	switch {
	case err == nil && rep.Finished():
		i.take(&rep)
		return h.ended(ctx, i), true
	case err == nil:
		return i, false
	}
	if api := (*appliance.APIError)(nil); !errors.As(err, &api) || api.Kind != appliance.KindUnknown {
		return i, false
	}
	// It knows nothing of it: it was never told, or the destination has the process.
	rep, err = h.clients[i.To].Show(ctx, i.Migration)
	if err == nil && rep.Outcome == appliance.OutcomeDone {
		i.take(&rep)
		return i, true
	}
	if api := (*appliance.APIError)(nil); err != nil && (!errors.As(err, &api) || api.Kind != appliance.KindUnknown) {
		return i, false
	}
	here, err := h.alive(ctx, &i)
	switch {
	case err != nil:
		return i, false
	case here:
		i.State, i.Reason = Waiting, ""
	default:
		i.State, i.Reason = Gone, "the process has ended"
	}
	return i, true
}

// ended is an item whose migration is over: where it failed because the process has ended,
// it says so.
func (h *hosts) ended(ctx context.Context, i Item) Item {
	if i.State != Failed && i.State != Refused {
		return i
	}
	if here, err := h.alive(ctx, &i); err == nil && !here {
		i.State, i.Reason = Gone, "the process has ended"
	}
	return i
}

// alive asks whether the process is where it was.
func (h *hosts) alive(ctx context.Context, i *Item) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	ps, err := h.clients[i.Host].Processes(ctx)
	if err != nil {
		return false, err
	}
	for _, p := range ps {
		if p.PID == i.PID && (i.Started == 0 || p.Started == i.Started) {
			return true, nil
		}
	}
	return false, nil
}
