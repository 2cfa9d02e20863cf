package pager

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// guardScan is a kernel that tells guards.
var guardScan = testutil.Requirement{Name: "PAGE_IS_GUARD (Linux 6.15)", Check: func() error {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = sys.PagemapScan(int(f.Fd()), &sys.PMScanArg{End: page.Size, CategoryMask: sys.PageIsGuard, ReturnMask: sys.PageIsGuard}, nil)
	return err
}}

// TestGuards: guards over pages that are missing stay, and there is nothing
// where they were.
func TestGuards(t *testing.T) {
	testutil.Require(t, guardScan)
	r := newRig(t)
	const pages = 2048
	p := startProgram(t, "guard", pages, 1, 1)
	a := p.adoption()
	a.Lazy = page.NewSet(a.Regions[0].Range)
	if err := r.c.Adopt(limit(t, 10*time.Second), a); err != nil {
		t.Fatal(err)
	}
	p.uffd.Close()
	p.say(t)
	testutil.Eventually(t, 20*time.Second, func() error {
		if r.stats().PagesFaulted == 0 {
			return errors.New("no thread waits for a page")
		}
		return nil
	})
	p.say(t)
	p.hear(t)
	r.connect(2)
	r.do("fetch", r.c.Fetch)
	r.do("resident", r.c.WaitResident)
	if st := r.stats(); st.PagesDropped == 0 {
		t.Errorf("nothing was given up: %+v", st)
	}
	p.say(t)
	p.hear(t)
	r.do("finish", r.c.Finish)
	t.Log(p.finish(t))
}
