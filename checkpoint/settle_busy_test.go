package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// On a machine where every stop takes long, whatever is done in it, a program that writes
// faster than can be copied ahead is settled all the same: not page by page.
func TestSettleWhereStopsTakeLong(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
	testutil.NoLeaks(t)
	const pages = 8 << 10
	v := startGrowing(t, pages, 2, 64, "write")
	fd := v.trap(t, nil)
	v.written(t, 100)
	cfg := v.early(v.config(), fd, false)
	stopped, ahead := cfg.Stopped, 0
	cfg.Stopped = func(ctx context.Context, parts []SettlePart) (page.Set, error) {
		time.Sleep(5 * time.Millisecond) // who is asked waits for a processor
		return stopped(ctx, parts)
	}
	cfg.Early = func(context.Context, []SettlePart) error {
		if ahead++; ahead > 30 {
			return errors.New("the program writes faster than it can be copied")
		}
		return nil
	}
	rep := settleAll(t, v.Pid(), cfg, v.shadows()...)
	t.Log(&rep)
	if n := len(rep.Stops) - ahead; n > pages/32 {
		t.Errorf("%d stops for %d pages", n, pages)
	}
	v.finish(t)
}

// A mapping that was to be replaced in one stop, when stops had more room, goes in as many
// as it takes then, not page by page.
func TestSettleWhereStopsGetShorter(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
	testutil.NoLeaks(t)
	const pages = 8 << 10
	v := startGrowing(t, pages, 2, 16, "write")
	fd := v.trap(t, nil)
	v.written(t, 100)
	s, err := Open(v.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cfg := v.early(v.config(), fd, false)
	cfg.Limit = 10 * time.Millisecond
	var st *Settler
	cfg.Early = func(context.Context, []SettlePart) error {
		st.cfg.Limit = time.Millisecond
		return nil
	}
	if st, err = NewSettler(s, cfg); err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rep, err := st.Settle(ctx, nil)
	t.Log(&rep)
	if n := len(rep.Stops); err != nil || n > pages/32 {
		t.Errorf("%d stops for %d pages; %v", n, pages, err)
	}
	v.finish(t)
}

// written waits until of each region that many pages in a hundred are the program's own.
func (v *veiled) written(t testing.TB, percent int) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, func() error {
		for i := range v.regions {
			r := v.region(i)
			if n, err := v.own(r); err != nil || n*100 < r.Pages()*percent {
				return errors.Join(err, fmt.Errorf("it has written %d pages of %d", n, r.Pages()))
			}
		}
		return nil
	})
}

// own counts the process's own pages of r.
func (v *veiled) own(r page.Range) (n int, err error) {
	pm, err := proc.OpenPagemap(v.Pid())
	if err != nil {
		return 0, err
	}
	defer pm.Close()
	err = pm.Kinds(r, func(r page.Range, k proc.PageKind) {
		if k == proc.PageOwn {
			n += r.Pages()
		}
	})
	return n, err
}
