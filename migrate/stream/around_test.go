package stream

import (
	"errors"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// TestAround: in the head start the block of a page that a thread waits for comes,
// and nothing else; after it comes all.
func TestAround(t *testing.T) {
	const headStart = 500 * time.Millisecond
	s := newSetup(t, []int{400}, func(c *FetcherConfig) { c.HeadStart = headStart })
	s.connect(transport.Urgent)
	s.connect(transport.Bulk)
	src := s.st.Source(0)
	began := time.Now()
	s.fetch.Start(true)
	const asked = 5*aroundPages + 3
	s.fetch.Urgent(0, []page.Num{src.Addr(asked).Page()})
	testutil.Eventually(t, 10*time.Second, func() error {
		for i := 5 * aroundPages; i < 6*aroundPages; i++ {
			if src.Wanted(i) {
				return errors.New("some of the block is missing")
			}
		}
		return nil
	})
	here := 0
	for i := range src.Len() {
		if !src.Wanted(i) {
			here++
		}
	}
	if took := time.Since(began); took < headStart && here != aroundPages {
		t.Errorf("%d pages are here after %v, want the %d of the block", here, took, aroundPages)
	}
	s.wait()
	if took := time.Since(began); took < headStart {
		t.Errorf("all was here after %v, before the head start of %v was over", took, headStart)
	}
	s.once()
}

// TestNoHeadStartForLittle: what is here at once needs none.
func TestNoHeadStartForLittle(t *testing.T) {
	s := newSetup(t, []int{400}, func(c *FetcherConfig) { c.HeadStart, c.HeadStartOver = time.Hour, 400*page.Size })
	s.connect(transport.Bulk)
	s.fetch.Start(true)
	s.wait()
	s.once()
}

// TestAroundAlone: before the stream was begun a demand brings its page alone.
func TestAroundAlone(t *testing.T) {
	s := newSetup(t, []int{400}, func(*FetcherConfig) {})
	s.connect(transport.Urgent)
	s.connect(transport.Bulk)
	src := s.st.Source(0)
	s.fetch.Urgent(0, []page.Num{src.Addr(70).Page()})
	testutil.Eventually(t, 10*time.Second, func() error {
		if src.Wanted(70) {
			return errors.New("it is missing")
		}
		return nil
	})
	time.Sleep(50 * time.Millisecond) // in which nothing is to happen
	for i := range src.Len() {
		if i != 70 && !src.Wanted(i) {
			t.Fatalf("page %d came too", i)
		}
	}
}
