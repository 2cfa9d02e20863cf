package dirty_test

import (
	"testing"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
)

// loser is a tracker that loses one written range of each look.
type loser struct {
	dirty.Tracker
	looks int
}

func (l *loser) Collect(maps []proc.Mapping) (dirty.Pages, error) {
	p, err := l.Tracker.Collect(maps)
	return l.lose(p), err
}

func (l *loser) Last(maps []proc.Mapping) (dirty.Pages, error) {
	p, err := l.Tracker.Last(maps)
	return l.lose(p), err
}

func (l *loser) lose(p dirty.Pages) dirty.Pages {
	if l.looks++; l.looks > 1 && p.Written.Len() > 1 {
		p.Written.Remove(p.Written.Ranges()[l.looks%p.Written.Len()])
	}
	return p
}

// The oracle must see what a bad tracker loses.
func TestOracle(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	for range 5 {
		p := dirtytest.Start(t)
		if err := dirtytest.Run(t, p, &loser{Tracker: track(t, p, dirty.WPAsync)}, dirtytest.Config{}); err != nil {
			return
		}
		p.Kill()
	}
	t.Error("a tracker that loses writes passed")
}
