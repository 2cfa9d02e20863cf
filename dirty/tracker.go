package dirty

import (
	"errors"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Method names a way of tracking.
type Method string

const (
	WPAsync   Method = "wp-async"
	SoftDirty Method = "soft-dirty"
	Hash      Method = "hash"
)

// ErrClosed: the tracker was closed.
var ErrClosed = errors.New("dirty: tracker closed")

// Pages is what one look found in the private mappings of a process.
type Pages struct {
	// Content are the pages of the process's own: anonymous memory and changed
	// pages of private file mappings, in memory or swapped out.
	Content page.Set
	// Written are those of Content that may have been written since the look
	// before; at the first look, and in a mapping that is new, all of them.
	Written page.Set
	// Guards are where an access is a fault of the program (MADV_GUARD_INSTALL).
	Guards page.Set
}

// Tracker tracks the pages of one process.
type Tracker interface {
	Method() Method
	// Collect looks at the private mappings among maps, which the caller has just
	// read, and begins a new interval for what it tells. After an error nothing is
	// known any more: the next look that works tells all content as written.
	Collect(maps []proc.Mapping) (Pages, error)
	// Peek returns those of pages that were written since the last Collect, as far
	// as that can be told cheaply, and changes nothing: what it returns need not be
	// sent now, since Collect will tell it again. It may return too few.
	Peek(pages *page.Set) (page.Set, error)
	// Close ends the tracking and leaves nothing of it in the process.
	Close() error
}

// special reports whether m is not the process's own memory.
func special(m *proc.Mapping) bool {
	switch m.Name {
	case "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]":
		return true
	}
	return false
}
