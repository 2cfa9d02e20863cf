package migrate

import (
	"context"
)

// rounds lands what the source sends while the process still runs there, until it
// says something else, which is returned. Caller has the turn.
func (a *arriving) rounds(ctx context.Context, c *control) (received, error) {
	for {
		r, err := c.recv(ctx)
		if err != nil {
			return r, err
		}
		a.d.kill("recv/" + r.msg.kind().String())
		if _, ok := r.msg.(*landMsg); !ok || !a.rec.Mode.Rounds() {
			return r, nil
		}
		if err := a.land(ctx, c, r); err != nil {
			return r, err
		}
	}
}

// land is one batch.
func (a *arriving) land(ctx context.Context, c *control, r received) error {
	b, err := decodeBatch(r.blobs[1])
	if err != nil {
		return err
	}
	if len(r.blobs[0]) > 0 {
		b.Layout = r.blobs[0]
	}
	var l Landed
	if err := a.whileListening(ctx, c, nil, func(ctx context.Context) error {
		return a.engine("land", func() (err error) { l, err = a.arrival.Land(ctx, b); return err })
	}); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return a.d.send(c, landedMsg{Pages: l.Pages, PagesZero: l.PagesZero, BytesWire: l.BytesWire,
		Micros: uint64(l.Took.Microseconds()), Stats: a.refresh().onAir()})
}
