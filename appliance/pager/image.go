package pager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// View is veiled memory: see restore.View.
type View struct {
	Range  page.Range `cbor:"1,keyasint"`
	Shadow page.Addr  `cbor:"2,keyasint"`
}

// FindView is the view that holds address a of the source, and how far behind its
// beginning.
func FindView(views []View, a page.Addr) (v View, rel page.Addr, ok bool) {
	i := sort.Search(len(views), func(i int) bool { return views[i].Range.End > a })
	if i == len(views) || a < views[i].Range.Start {
		return v, 0, false
	}
	return views[i], a - views[i].Range.Start, true
}

// image is the memory that a veiled process sees in the place of its own: a
// page.Source whose pages have the numbers that they have at the source. What is here
// is in the shadows. Pages that are not, it has from the source, for its own use only:
// the shadow's come as ever.
type image struct {
	views  []View // ascending
	src    *pagestore.Source
	mem    int // /proc/PID/mem of the process; its number stays
	remote page.Source
	recent recent
}

// shadow is where page n of the image has its content.
func (m *image) shadow(n page.Num) (at page.Addr, ok bool) {
	v, rel, ok := FindView(m.views, n.Addr())
	return v.Shadow + rel, ok
}

// what a page of the image is.
type pageState uint8

const (
	isZero    pageState = iota
	isHere              // in the shadow
	isMissing           // at the source
)

func (m *image) state(src page.Addr) pageState {
	i, ok := m.src.Find(src)
	if !ok || m.src.GivenUp(i) {
		return isZero // a hole, or given up
	}
	for _, sp := range m.src.Spaces() {
		if !sp.Forked() && !sp.IsMissing(i) {
			return isHere
		}
	}
	return isMissing
}

// lookup says what page n is, and where it is here.
func (m *image) lookup(n page.Num) (shadow page.Addr, st pageState) {
	shadow, ok := m.shadow(n)
	if !ok {
		return 0, isZero
	}
	return shadow, m.state(n.Addr())
}

// ReadPages answers the program's own faults.
func (m *image) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	for len(buf) > 0 {
		shadow, st := m.lookup(first)
		n := 1
		for ; n < len(buf)>>page.Shift; n++ {
			at, s := m.lookup(first + page.Num(n))
			if s != st || st == isHere && at != shadow+page.Addr(n)<<page.Shift {
				break
			}
		}
		part := buf[:n<<page.Shift]
		var err error
		switch st {
		case isZero:
			clear(part)
		case isHere:
			err = m.resident(ctx, first, shadow, part, prio)
		case isMissing:
			err = m.remote.ReadPages(ctx, first, part, prio)
		}
		if err != nil {
			return err
		}
		if st != isZero {
			m.recent.put(first, part)
		}
		first, buf = first+page.Num(n), buf[n<<page.Shift:]
	}
	return nil
}

// patience is how long the shadow may take. It is memory of a process with a lock of
// its own, which somebody may hold who waits for what is read here: a fault that is
// tried again holds it for reading, and who wants to write to it keeps others out
// (filemap_fault, down_read). Such a fault had the page already, and lost it, as it was
// dropped from the page cache meanwhile. So what was read last is kept. The source has
// the page, too, as long as it lives.
const patience = 20 * time.Millisecond

// resident reads pages that are in the shadow.
func (m *image) resident(ctx context.Context, first page.Num, at page.Addr, buf []byte, prio page.Priority) error {
	b := make([]byte, len(buf)) // given up where it takes too long
	done := make(chan error, 2)
	go func() {
		n, err := unix.Pread(m.mem, b, int64(at))
		if err == nil && n != len(b) {
			err = io.ErrUnexpectedEOF
		}
		done <- err
	}()
	t := time.NewTimer(patience)
	defer t.Stop()
	var err error
	select {
	case err = <-done:
		if err == nil {
			copy(buf, b)
			return nil
		}
	case <-t.C:
	}
	if m.recent.get(first, buf) {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	other := make([]byte, len(buf))
	got := make(chan error, 1)
	go func() { got <- m.remote.ReadPages(ctx, first, other, prio) }()
	if err != nil { // the shadow cannot be read
		done = nil
	}
	for {
		select {
		case err := <-done:
			if err == nil {
				copy(buf, b)
				return nil
			}
			done = nil
		case err := <-got:
			if err == nil {
				copy(buf, other)
				return nil
			}
			if got = nil; done == nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if done == nil && got == nil {
			return errors.New("pager: a page that is here can be read neither from the process nor from the source")
		}
	}
}

// checkViews refuses what the rest would take for granted.
func checkViews(views []View, regions []Region) error {
	shadows := map[page.Addr]page.Range{}
	for _, r := range regions {
		if r.Shadow != 0 {
			shadows[r.Shadow] = r.Range
		}
	}
	at := page.Addr(0)
	for _, v := range views {
		if v.Range.Empty() || !v.Range.Aligned() || !v.Shadow.Aligned() || v.Range.Start < at {
			return fmt.Errorf("pager: view %v is empty, not of whole pages or out of order", v.Range)
		}
		if at = v.Range.End; shadows[v.Shadow] != v.Range {
			return fmt.Errorf("pager: view %v has no region", v.Range)
		}
	}
	return nil
}
