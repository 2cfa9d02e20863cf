package appliance

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// gate is the host as migrate sees it: admission before the engine, and a claim
// on memory for each process that is on its way in.
type gate struct {
	host      Host
	admission *admission

	mu     sync.Mutex // orders a check of memory before the claim that follows from it
	claims memoryClaims
}

func newGate(h Host, a *admission) *gate {
	g := &gate{host: h, admission: a}
	a.claimed = g.claims.sum
	a.running = g.claims.count
	return g
}

// Prepare implements migrate.Host.
func (g *gate) Prepare(ctx context.Context, id transport.MigrationID, o migrate.Offer) (migrate.Arrival, error) {
	peer := peerOf(ctx)
	if peers := g.admission.limits.Peers; len(peers) > 0 && !slices.Contains(peers, peer.Name) {
		return nil, &migrate.Refusal{Reasons: []string{fmt.Sprintf("host %q is not among those that may send processes here (limits.peers)", peer.Name)}}
	}
	g.mu.Lock()
	err := g.admission.check(o)
	if err == nil {
		g.claims.set(id, func() uint64 { return o.MemoryBytes })
	}
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	inner, err := g.host.Prepare(ctx, peer, id, o)
	if err != nil {
		g.claims.drop(id)
		return nil, err
	}
	return g.claim(id, o.MemoryBytes, inner), nil
}

// Adopt implements migrate.Host.
func (g *gate) Adopt(ctx context.Context, id transport.MigrationID) (migrate.Arrival, error) {
	inner, err := g.host.Adopt(ctx, id)
	if err != nil {
		return nil, err
	}
	return g.claim(id, inner.Stats().PagesTotal*page.Size, inner), nil
}

func (g *gate) claim(id transport.MigrationID, bytes uint64, inner migrate.Arrival) migrate.Arrival {
	g.claims.set(id, func() uint64 {
		// What has arrived is in use already, and not free any more.
		return bytes - min(bytes, inner.Stats().PagesResident*page.Size)
	})
	c := &claimed{Arrival: inner, drop: func() { g.claims.drop(id) }}
	if d, ok := inner.(migrate.Describer); ok {
		return &describedClaim{claimed: c, Describer: d}
	}
	return c
}

// claimed is an arrival whose claim on memory ends with it.
type claimed struct {
	migrate.Arrival
	drop func()
}

type describedClaim struct {
	*claimed
	migrate.Describer
}

func (c *claimed) Resident(ctx context.Context) error {
	err := c.Arrival.Resident(ctx)
	if err == nil {
		c.drop()
	}
	return err
}

func (c *claimed) Abort(ctx context.Context) error {
	c.drop()
	return c.Arrival.Abort(ctx)
}

func (c *claimed) Close() error {
	c.drop()
	return c.Arrival.Close()
}
