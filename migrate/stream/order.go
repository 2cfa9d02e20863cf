package stream

import (
	"iter"

	"github.com/pageferry/pageferry/pagestore"
)

// Order is what the background stream goes by: runs of pages, earlier ones
// first. Pages that are not missing are skipped, so it may name pages twice. It
// is begun anew when something is missing after its end.
type Order func(*pagestore.Store) iter.Seq2[*pagestore.Source, pagestore.Span]

// HotEagerAscending is the default order: what is touched at once, what must be
// there before the process runs, and the rest by address.
func HotEagerAscending(st *pagestore.Store) iter.Seq2[*pagestore.Source, pagestore.Span] {
	return parts(st, (*pagestore.Source).Hot, (*pagestore.Source).Eager,
		func(s *pagestore.Source) []pagestore.Span { return []pagestore.Span{{First: 0, End: s.Len()}} })
}

// hotEager is the beginning of every order: what is fetched before the process
// runs, while all that is not needed for that would only be in the way.
func hotEager(st *pagestore.Store) iter.Seq2[*pagestore.Source, pagestore.Span] {
	return parts(st, (*pagestore.Source).Hot, (*pagestore.Source).Eager)
}

func parts(st *pagestore.Store, of ...func(*pagestore.Source) []pagestore.Span) iter.Seq2[*pagestore.Source, pagestore.Span] {
	return func(yield func(*pagestore.Source, pagestore.Span) bool) {
		sources := st.Sources()
		for _, part := range of {
			for _, src := range sources {
				for _, sp := range part(src) {
					if !yield(src, sp) {
						return
					}
				}
			}
		}
	}
}
