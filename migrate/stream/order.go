package stream

import (
	"github.com/pageferry/pageferry/pagestore"
)

// Order is what the background stream goes by: runs of pages, earlier ones
// first. Pages that are not missing are skipped, so it may name pages twice. It
// is begun anew when something is missing after its end.
//
// What it returns is called by one goroutine at a time, but by many, some of
// which own their threads. That is why it is no iterator: the runtime ends the
// program that resumes an iter.Pull under another thread lock than it began with.
type Order func(*pagestore.Store) Next

// Next returns the next run; ok is false at the end.
type Next func() (src *pagestore.Source, run pagestore.Span, ok bool)

// EagerHotAscending is the default order: what must be there before the process
// runs, what is touched at once, and the rest by address. What is touched at once
// can be all that was written during the last round: the process does not wait
// for that.
func EagerHotAscending(st *pagestore.Store) Next {
	return parts(st, (*pagestore.Source).Eager, (*pagestore.Source).Hot,
		func(s *pagestore.Source) []pagestore.Span { return []pagestore.Span{{First: 0, End: s.Len()}} })
}

// eagerHot is the beginning of every order: what is fetched before the process
// runs, while all that is not needed for that would only be in the way.
func eagerHot(st *pagestore.Store) Next {
	return parts(st, (*pagestore.Source).Eager, (*pagestore.Source).Hot)
}

func parts(st *pagestore.Store, of ...func(*pagestore.Source) []pagestore.Span) Next {
	type list struct {
		src  *pagestore.Source
		runs []pagestore.Span
	}
	var lists []list
	sources := st.Sources()
	for _, part := range of {
		for _, src := range sources {
			lists = append(lists, list{src, part(src)})
		}
	}
	return func() (*pagestore.Source, pagestore.Span, bool) {
		for len(lists) > 0 {
			l := &lists[0]
			if len(l.runs) > 0 {
				run := l.runs[0]
				l.runs = l.runs[1:]
				return l.src, run, true
			}
			lists = lists[1:]
		}
		return nil, pagestore.Span{}, false
	}
}
