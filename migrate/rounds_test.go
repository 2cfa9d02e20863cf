package migrate

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

func pages(from, to int) page.Set {
	return page.NewSet(page.Range{Start: page.Num(from).Addr(), End: page.Num(to).Addr()})
}

// What goes with the map of memory after rounds: what was written since the last
// look is dirty and hot, what was not sent is dirty, the rest is neither.
func TestRoundsDirty(t *testing.T) {
	r := &rounds{content: pages(0, 100), clean: pages(0, 90)}
	written := page.NewSet(page.PageOf(page.Num(5).Addr()), page.PageOf(page.Num(95).Addr()), page.PageOf(page.Num(200).Addr()))
	got := r.dirty([]Memory{{Space: 3}, {Lazy: pages(0, 100), Hot: pages(7, 8), Dirty: written.Clone()}})
	m := got[1]
	for n, want := range map[int]struct{ dirty, hot bool }{
		0: {false, false}, 5: {true, true}, 7: {false, true}, 89: {false, false}, 90: {true, false}, 95: {true, true},
		200: {true, false}, // not lazy: it does not come by itself
	} {
		at := page.Num(n).Addr()
		if m.Dirty.Contains(at) != want.dirty || m.Hot.Contains(at) != want.hot {
			t.Errorf("page %d: dirty %v, hot %v", n, m.Dirty.Contains(at), m.Hot.Contains(at))
		}
	}
	if len(got) != 2 || !got[0].Dirty.Empty() {
		t.Errorf("another address space: %+v", got[0])
	}
	// Much that was written lately is no hint.
	r = &rounds{content: pages(0, 1<<20), clean: pages(0, 1<<20)}
	got = r.dirty([]Memory{{Lazy: pages(0, 1<<20), Dirty: pages(0, mostHot>>page.Shift+1)}})
	if !got[0].Hot.Empty() {
		t.Errorf("%d hot pages", got[0].Hot.Pages())
	}
	// The destination must hear of what was not sent, also where the map has no part
	// for it.
	r = &rounds{content: pages(0, 10), clean: pages(0, 9)}
	if got = r.dirty(nil); len(got) != 1 || got[0].Dirty.Pages() != 1 {
		t.Errorf("%+v", got)
	}
}

// TestBatchIsBounded: what a source may ask for at once takes a bounded amount of
// memory at the destination, in how many classes ever.
func TestBatchIsBounded(t *testing.T) {
	for _, c := range []struct {
		classes []page.Set
		ok      bool
	}{
		{[]page.Set{pages(1, 1+maxBatch)}, true},
		{[]page.Set{pages(1, 2+maxBatch)}, false},
		{[]page.Set{pages(1, 1<<30), pages(1<<31, 1<<40)}, false},
		{[]page.Set{pages(1, maxBatch), pages(1<<31, 1<<31+1)}, true},
		{[]page.Set{pages(1, maxBatch), pages(1<<31, 1<<31+2)}, false},
	} {
		b, err := encodeBatch(&Batch{Classes: c.classes, Gone: pages(1, 1<<40)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeBatch(b); (err == nil) != c.ok {
			t.Errorf("%v: %v", c.classes, err)
		}
	}
}

// looker is a process whose looks find what they are told to.
type looker struct {
	Process
	found Look
}

func (l *looker) Look(context.Context) (Look, error) { return l.found, nil }

// TestComparedIsNotWritten: what is compared with what was sent, and was not sent yet,
// says nothing about what the program writes; what was sent does.
func TestComparedIsNotWritten(t *testing.T) {
	at := func(first, end page.Num) page.Range { return page.Range{Start: first.Addr(), End: end.Addr()} }
	all := page.NewSet(at(1, 9))
	p := &looker{found: Look{Content: all, Written: all, Compared: page.NewSet(at(3, 9))}}
	r := &rounds{s: bare(SourceConfig{Process: p}), landed: page.NewSet(at(5, 7))}
	if err := r.look(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if want := page.NewSet(at(1, 3), at(5, 7)); !slices.Equal(r.written.Ranges(), want.Ranges()) || !r.clean.Empty() {
		t.Errorf("%v counts as written, %v as clean", r.written.Ranges(), r.clean.Ranges())
	}
	if m := r.measured(time.Now()); m.Compared != 6*page.Size || m.Inputs(time.Second, 0).State <= StateTime(0, m.Content) {
		t.Errorf("%d bytes are compared, in %v", m.Compared, m.Inputs(time.Second, 0).State)
	}
}
