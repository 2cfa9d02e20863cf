package codec

import (
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// Round says when and on which lane pages are sent, and with that what they may
// stand on: on what was sent in an earlier round, all of which is placed before
// the next begins, and on what was sent in this one on the same lane, which is
// placed in order.
//
// What stands on other pages is right only if these are as they were sent. So,
// before a round begins, the pages that it will send are to be forgotten by
// Twins; pages that were dropped by both Twins and Sent; and everything when a
// lane was lost, since nobody knows what of it has arrived.
type Round struct {
	// Number counts the rounds from 1. In round 0 nothing stands on anything:
	// so it must be where the program may already run at the destination.
	Number uint32
	Lane   uint8
	// Keep has Sent remember what is sent. It pays for pages that were sent
	// before, which are likely to be sent again, and not for a first round.
	Keep bool
}

// has reports whether what was sent in o has been placed when what is sent in r is
// taken up.
func (r Round) has(o Round) bool {
	return r.Number > 0 && (o.Number < r.Number || o.Number == r.Number && o.Lane == r.Lane)
}

// Count is pages, and the bytes of the payload that they took.
type Count struct{ Pages, Bytes uint64 }

// Saved is how many bytes of payload were spared.
func (c Count) Saved() uint64 { return c.Pages*page.Size - c.Bytes }

// Stats is what went how.
type Stats struct{ Raw, Zero, LZ4, Delta, Same Count }

// Add adds o to s.
func (s *Stats) Add(o Stats) {
	for _, c := range [...][2]*Count{{&s.Raw, &o.Raw}, {&s.Zero, &o.Zero}, {&s.LZ4, &o.LZ4}, {&s.Delta, &o.Delta}, {&s.Same, &o.Same}} {
		c[0].Pages += c[1].Pages
		c[0].Bytes += c[1].Bytes
	}
}

func (s Stats) String() string {
	text := fmt.Sprintf("raw %d pages", s.Raw.Pages)
	for _, c := range []struct {
		name string
		c    Count
	}{{"zero", s.Zero}, {"lz4", s.LZ4}, {"delta", s.Delta}, {"same", s.Same}} {
		if c.c.Pages > 0 {
			text += fmt.Sprintf(", %s %d pages in %d bytes", c.name, c.c.Pages, c.c.Bytes)
		}
	}
	return text
}
