package pager

import (
	"context"
	"errors"
	"os"

	"github.com/pageferry/pageferry/transport"
)

// Client is the daemon's handle on a pager.
type Client struct{}

var errNotThere = errors.New("pager: not built into this binary")

// Start runs a pager and its keeper.
func Start(ctx context.Context, cfg Config) (*Client, error) { return nil, errNotThere }

// Connect finds the living pager of cfg.Dir, or fails with ErrNoPager.
func Connect(ctx context.Context, cfg Config) (*Client, error) { return nil, errNotThere }

// Takeover starts a new pager in the place of a dead one, whose keeper is the
// process keeperPID; 0 means the one recorded in cfg.Dir. Lanes must be attached
// again, in a new epoch. The old keeper is ended.
func Takeover(ctx context.Context, cfg Config, keeperPID int) (*Client, error) {
	return nil, errNotThere
}

// AttachLane gives the pager a connection whose preamble has been read and
// nothing more. key is the one-time key of the epoch. f stays the caller's.
func (c *Client) AttachLane(ctx context.Context, id transport.LaneID, key []byte, f *os.File) error {
	return errNotThere
}

// NewEpoch closes all lanes; lanes of an older epoch are refused from here on.
func (c *Client) NewEpoch(ctx context.Context, epoch uint32) error { return errNotThere }

// AttachFile makes a file a source of pages, in the place of lanes. The file
// stays the caller's.
func (c *Client) AttachFile(ctx context.Context, pf PageFile) error { return errNotThere }

// Adopt hands over an address space. Its faults are served from then on. The
// files stay the caller's, who should close them when it returns.
func (c *Client) Adopt(ctx context.Context, a Adoption) error { return errNotThere }

// Fetch begins the background stream. Idempotent.
func (c *Client) Fetch(ctx context.Context) error { return errNotThere }

// WaitEager waits until every eager page of what was adopted is in place. It
// needs Fetch. Broken lanes do not end it: new ones may come.
func (c *Client) WaitEager(ctx context.Context) error { return errNotThere }

// WaitResident waits until every page has arrived.
func (c *Client) WaitResident(ctx context.Context) error { return errNotThere }

// Events is closed when the pager is gone or the client is closed. Whoever is
// slow misses Progress events but no others.
func (c *Client) Events() <-chan Event { return nil }

// Stats is a fresh snapshot.
func (c *Client) Stats(ctx context.Context) (Stats, error) { return Stats{}, errNotThere }

// Finish leaves plain memory behind and ends pager and keeper. It fails, and
// changes nothing, while a page is missing.
func (c *Client) Finish(ctx context.Context) error { return errNotThere }

// Poison makes every missing page raise SIGBUS at its next touch, because the
// source is lost for good.
func (c *Client) Poison(ctx context.Context) error { return errNotThere }

// Abort kills pager and keeper. What they served reads zeros from then on, so
// the process must be dead before. Idempotent.
func (c *Client) Abort(ctx context.Context) error { return errNotThere }

// PID and KeeperPID are those of the two processes.
func (c *Client) PID() int       { return 0 }
func (c *Client) KeeperPID() int { return 0 }

// Close lets go of the pager, which lives on.
func (c *Client) Close() error { return nil }
