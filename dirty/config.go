package dirty

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Stop makes the process stand still, as a whole, until resume is called. resume
// is called exactly once where err is nil.
type Stop func() (resume func() error, err error)

// Config says what to track, and with what.
type Config struct {
	// PID is the process, as this program's /proc shows it.
	PID int
	// Method forces one. Empty: the best that works.
	Method Method
	// OpenUserfault makes the process open a userfaultfd (UFFD_USER_MODE_ONLY will
	// do), with no API negotiated, and take it over: the process must have none
	// left. wp-async needs it.
	OpenUserfault func(ctx context.Context) (*os.File, error)
	// Stop is for soft-dirty, which needs it for some milliseconds at each look.
	Stop Stop
	// Shared asks for shared memory, too.
	Shared bool
	// Open opens the object behind a shared mapping of those that Collect is given.
	// Nil: /proc/PID/map_files has it.
	Open func(page.Range) (*os.File, error)
	// Pace is called before so many bytes are read to be compared, and may wait:
	// at the last look, while the process stands still, it should not. Several
	// goroutines call it. Nil never waits.
	Pace func(bytes int)
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	switch {
	case c.PID <= 0:
		return fmt.Errorf("dirty: no process: pid %d", c.PID)
	case c.Method != "" && !slices.Contains(Methods, c.Method):
		return fmt.Errorf("dirty: unknown method %q: it is one of %v", c.Method, Methods)
	}
	return nil
}

// New begins to track a process by the method that c forces, or the best one that
// works. lacking says why better ones do not. The process is as it was where New
// fails.
func New(ctx context.Context, c Config) (t Tracker, lacking []Support, err error) {
	if err := c.Validate(); err != nil {
		return nil, nil, err
	}
	if c.Method != "" {
		t, err = c.open(ctx, c.Method)
		if err != nil {
			err = fmt.Errorf("dirty: track pid %d by %s: %w", c.PID, c.Method, err)
		}
		return t, nil, err
	}
	for _, m := range Methods {
		t, err = c.open(ctx, m)
		if err == nil {
			return t, lacking, nil
		}
		if ctx.Err() != nil || errors.Is(err, proc.ErrGone) {
			break
		}
		lacking = append(lacking, Support{m, err})
	}
	return nil, lacking, fmt.Errorf("dirty: track pid %d: %w", c.PID, err)
}

func (c *Config) opener() func(page.Range) (*os.File, error) {
	if c.Open != nil {
		return c.Open
	}
	return func(r page.Range) (*os.File, error) {
		return os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", c.PID, uint64(r.Start), uint64(r.End)))
	}
}

func (c *Config) open(ctx context.Context, m Method) (Tracker, error) {
	if err := probe(m); err != nil {
		return nil, err
	}
	h := newHashes(c.Pace)
	var s *shared
	if c.Shared {
		s = newShared(c.opener(), h)
	}
	switch m {
	case WPAsync:
		if c.OpenUserfault == nil {
			return nil, errors.New("there is no way to make the process open a userfaultfd")
		}
		f, err := c.OpenUserfault(ctx)
		if err != nil {
			return nil, err
		}
		t, err := newWP(c.PID, f, s)
		if err != nil {
			return nil, err
		}
		return t, nil
	case SoftDirty:
		if c.Stop == nil {
			return nil, errors.New("there is no way to make the process stand still")
		}
		t, err := newSoftDirty(c.PID, c.Stop, s)
		if err != nil {
			return nil, err
		}
		return t, nil
	}
	t, err := newHash(c.PID, h, s)
	if err != nil {
		return nil, err
	}
	return t, nil
}
