package bulk

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/plan/fleet"
)

// Forecast is what would become of an item.
type Forecast struct {
	Item
	// Mode, with TotalMS, DowntimeMS and BytesWire, is what was predicted; without a
	// prediction, Unknown is why there is none.
	Unknown string `json:"unknown,omitempty"`
}

// Plan says what a run would do. Processes are let be, but for what "migrate --dry-run"
// does to learn what they write and what the link carries: each stands still for some
// milliseconds once. Items that would be refused have that state.
func Plan(ctx context.Context, f *File) ([]Forecast, error) {
	h, err := openHosts(f)
	if err != nil {
		return nil, err
	}
	defer h.close()
	items, err := h.survey(ctx)
	if err != nil {
		return nil, err
	}
	fl := f.fleet(items)
	if err := fl.Validate(); err != nil {
		return nil, err
	}
	where := fleet.Place(fl)
	out := make([]Forecast, len(items))
	var wg sync.WaitGroup
	one := map[string]*sync.Mutex{} // measured beside each other they would slow each other
	for name := range f.Hosts {
		one[name] = new(sync.Mutex)
	}
	for k := range items {
		out[k].Item = items[k]
		i := &out[k]
		id := i.ID()
		if i.To = where.To[id]; i.To == "" {
			i.State, i.Reason = Refused, where.Refused[id]
			continue
		}
		wg.Go(func() {
			one[i.Host].Lock()
			defer one[i.Host].Unlock()
			h.foresee(ctx, i)
		})
	}
	wg.Wait()
	return out, ctx.Err()
}

// foresee asks both hosts about an item.
func (h *hosts) foresee(ctx context.Context, i *Forecast) {
	rep, err := h.clients[i.Host].DryRun(ctx, h.request(&i.Item, h.file.group(i.Group).MaxBandwidth))
	if api := (*appliance.APIError)(nil); errors.As(err, &api) {
		i.State, i.Reason = Refused, strings.Join(append(api.Reasons, api.Message)[:max(1, len(api.Reasons))], "; ")
		return
	}
	if err != nil {
		i.Unknown = err.Error()
		return
	}
	if len(rep.Reasons) > 0 {
		i.State, i.Reason = Refused, strings.Join(rep.Reasons, "; ")
		return
	}
	if rep.Outlook == nil {
		i.Unknown = "nothing is known of the process or the link"
		return
	}
	mode := h.file.group(i.Group).Mode
	if mode == "" || mode == "auto" {
		mode = string(rep.Auto)
	}
	for _, p := range rep.Predictions {
		if p.Mode == migrate.Mode(mode) {
			i.Mode, i.TotalMS, i.DowntimeMS, i.BytesWire = mode, p.TotalMS, p.DowntimeMS, p.BytesWire
			return
		}
	}
	if i.Unknown = rep.Unmeasured; i.Unknown == "" {
		i.Unknown = "there is no prediction for mode " + mode
	}
}
