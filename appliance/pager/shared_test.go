package pager

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// TestShared: of shared memory MADV_DONTNEED drops nothing, MADV_REMOVE all.
func TestShared(t *testing.T) {
	r := newRig(t)
	const pages = 2048
	p := startProgram(t, "shared", pages, 1, 1)
	r.connect(1)
	a := p.adoption()
	a.Regions[0].Shared = true
	if err := r.c.Adopt(limit(t, 10*time.Second), a); err != nil {
		t.Fatal(err)
	}
	p.uffd.Close()
	p.say(t)
	// Every page that is looked at is missing: the stream begins afterwards.
	testutil.Eventually(t, 60*time.Second, func() error {
		if st := r.stats(); st.Removes < pages/4 && p.Alive() {
			return errors.New("the program is not through")
		}
		return nil
	})
	r.do("fetch", r.c.Fetch)
	r.do("resident", r.c.WaitResident)
	st := r.stats()
	r.do("finish", r.c.Finish)
	if out := p.finish(t); !strings.Contains(out, "2048 pages shared") {
		t.Errorf("program: %s", out)
	}
	if st.PagesDropped == 0 || st.Remaps != pages/8 {
		t.Errorf("%+v", st)
	}
}
