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

// Methods are all of them, the best first.
var Methods = []Method{WPAsync, SoftDirty, Hash}

// ErrClosed: the tracker was closed.
var ErrClosed = errors.New("dirty: tracker closed")

// Pages is what one look found in a process.
type Pages struct {
	// Content are the pages of the process's own in private mappings: anonymous
	// memory and changed pages of private file mappings, in memory or swapped out.
	Content page.Set
	// Written are those of Content that may have been written since the look
	// before; at the first look, and in a mapping that is new, all of them.
	Written page.Set
	// Guards are where an access is a fault of the program (MADV_GUARD_INSTALL).
	Guards page.Set
	// Shared is the same of shared memory, where Config.Shared asks for it.
	Shared Shared
}

// Shared is what one look found in the objects of shared memory that a process
// has mapped: MAP_SHARED|MAP_ANONYMOUS and memfds. Each page of an object is told
// once, at its address in the first shared mapping of the object that shows it.
// What no shared mapping shows is not told. Pages are compared with what Sent says,
// whatever the method.
type Shared struct {
	Content page.Set // pages that the object has
	Written page.Set // those of them that are not as they were sent
}

// Tracker tracks the pages of one process.
type Tracker interface {
	Method() Method
	// Collect looks at the mappings in maps, which the caller has just read, and
	// begins a new interval for what it tells. maps are all mappings of the process,
	// or all anonymous ones, all private ones of files, all shared ones: what is
	// known of the other kinds remains, though looking at them apart costs more.
	// After an error nothing is known any more: the next look that works tells all
	// content as written.
	Collect(maps []proc.Mapping) (Pages, error)
	// Last is Collect for a process that stands still and will not be looked at
	// again as a rule: it begins no new interval where that costs time. A Collect after
	// it may tell again what it told, and loses nothing.
	Last(maps []proc.Mapping) (Pages, error)
	// Peek returns those of pages that were written since the last Collect, as far
	// as that can be told cheaply, and changes nothing: what it returns need not be
	// sent now, since Collect will tell it again. It may return too few.
	Peek(pages *page.Set) (page.Set, error)
	// Sent says that the pages of rs have been read since the last Collect and that
	// buf, what was read, is what whoever collects them has now. Pages that are
	// compared are told as written until they are as they were sent; of the others
	// nothing is noted. buf is not kept.
	Sent(rs []page.Range, buf []byte)
	// Close ends the tracking and leaves nothing of it in the process.
	Close() error
}

// private reports whether m can hold memory of the process's own.
func private(m *proc.Mapping) bool { return !m.Shared && !special(m) && !m.Has("dp") }

// special reports whether m is the kernel's.
func special(m *proc.Mapping) bool {
	switch m.Name {
	case "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]":
		return true
	}
	return false
}

// found gathers what walks find, in any order.
type found struct{ content, written, guards []page.Range }

func (f *found) addContent(r page.Range) { f.content = join(f.content, r) }
func (f *found) addWritten(r page.Range) { f.written = join(f.written, r) }
func (f *found) addGuard(r page.Range)   { f.guards = join(f.guards, r) }

// append adds what another walk found, of what lies behind.
func (f *found) append(o *found) {
	for _, l := range []struct {
		to   *[]page.Range
		more []page.Range
	}{{&f.content, o.content}, {&f.written, o.written}, {&f.guards, o.guards}} {
		if len(l.more) > 0 {
			*l.to = append(join(*l.to, l.more[0]), l.more[1:]...)
		}
	}
}

func join(to []page.Range, r page.Range) []page.Range {
	if n := len(to); n > 0 && to[n-1].End == r.Start {
		to[n-1].End = r.End
		return to
	}
	return append(to, r)
}

func (f *found) pages() Pages {
	return Pages{Content: page.NewSet(f.content...), Written: page.NewSet(f.written...), Guards: page.NewSet(f.guards...)}
}

// untold is what a look has found written outside the mappings that it was asked
// for, such as those that came after they were listed. It is kept until somebody
// asks for them.
type untold struct{ written page.Set }

// restrict leaves in p what is in maps.
func (u *untold) restrict(p *Pages, maps []proc.Mapping) {
	var in page.Set
	for i := range maps {
		if private(&maps[i]) {
			in.Add(maps[i].Range)
		}
	}
	if u.written.Empty() && within(&p.Content, &in) && within(&p.Guards, &in) {
		return // as nearly always
	}
	before := page.Intersection(&u.written, &in)
	out, more := page.Difference(&u.written, &in), page.Difference(&p.Written, &in)
	u.written = page.Union(&out, &more)
	p.Content = page.Intersection(&p.Content, &in)
	p.Guards = page.Intersection(&p.Guards, &in)
	p.Written = page.Intersection(&p.Written, &in)
	before = page.Intersection(&before, &p.Content)
	p.Written = page.Union(&p.Written, &before)
}

// within reports whether all of s is in the set in.
func within(s, in *page.Set) bool {
	left := in.Ranges()
	for _, r := range s.Ranges() {
		for len(left) > 0 && left[0].End < r.End {
			left = left[1:]
		}
		if len(left) == 0 || !left[0].Covers(r) {
			return false
		}
	}
	return true
}

// run is a stretch of the address space in which all mappings are private and
// either none or all of them are of files. What lies between them is free.
type run struct {
	page.Range
	anon   bool
	maps   []proc.Mapping // of which the first and the last may reach farther
	mapped uint64         // bytes
}

// mostMapped is how many mapped bytes a run has: while it is walked the kernel keeps
// the process from changing its mappings (mmap_lock). 128 MiB of small pages take
// 0.4 ms.
const mostMapped = 128 << 20

// farApart is a gap that is not walked over: the walk looks into the page tables
// that are near.
const farApart = 1 << 30

// runs groups the private mappings, and cuts large ones into pieces: a call for
// each of many small ones would cost more than the walk of what is in them.
//
// Where maps has mappings of one kind only, others may lie between them.
func runs(maps []proc.Mapping) (out []run) {
	var kinds [2]bool
	for i := range maps {
		if private(&maps[i]) {
			kinds[min(1, maps[i].Ino)] = true
		}
	}
	gaps := kinds[0] && kinds[1]
	open := false
	for i := range maps {
		m := &maps[i]
		if !private(m) {
			open = false
			continue
		}
		for left := m.Range; !left.Empty(); {
			var last *run
			if open {
				last = &out[len(out)-1]
			}
			if last == nil || last.anon != (m.Ino == 0) || last.mapped == mostMapped ||
				left.Start != last.End && !gaps || left.Start-last.End > farApart {
				out = append(out, run{page.Range{Start: left.Start, End: left.Start}, m.Ino == 0, maps[i:i], 0})
				last, open = &out[len(out)-1], true
			}
			n := min(left.Bytes(), mostMapped-last.mapped)
			left.Start += page.Addr(n)
			last.End, last.mapped = left.Start, last.mapped+n
			if k := len(last.maps); k == 0 || last.maps[k-1].Start != m.Start {
				last.maps = last.maps[:k+1]
			}
		}
	}
	return out
}
