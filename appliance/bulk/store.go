package bulk

import (
	"context"
	"errors"
)

// ErrHeld: another coordinator is at work on the run, or on the process.
var ErrHeld = errors.New("another coordinator has it")

// Store keeps what is known of a run, for whoever carries it on, and keeps coordinators
// off each other. Its methods may be called by one goroutine at a time.
type Store interface {
	// Items are those of the run, in no order.
	Items(ctx context.Context) ([]Item, error)
	// Put keeps an item; it is durable on return.
	Put(ctx context.Context, i Item) error
	// Hold keeps all other coordinators off an item until Drop, or the end of this one.
	// It fails with ErrHeld.
	Hold(ctx context.Context, id string) error
	Drop(ctx context.Context, id string) error
	// Close lets go of everything.
	Close() error
}
