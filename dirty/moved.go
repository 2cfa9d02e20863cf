package dirty

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// tables finds page tables that mremap has moved as a whole: it marks each page
// that it moves as soft-dirty, but not where it can move the table instead
// (move_normal_pmd, mm/mremap.c). Then pages lie where others lay, and nothing
// says so.
//
// Some pages of each table are kept an eye on. One that is in the same frame and
// not dirty is the page that was there before, and so is all of its table: a page
// that was moved here had another frame then. Where there is none such, all of the
// table counts as written.
type tables struct {
	seen map[page.Addr][]seenPage // by the begin of what a table maps of one mapping
}

type seenPage struct {
	at    page.Addr
	frame uint64
}

const (
	tableBytes = 2 << 20
	watched    = 6 // pages of each table
)

// moved returns the parts of content that may have been moved in since it was
// called before. The process stands still.
func (t *tables) moved(maps []proc.Mapping, content, dirty *page.Set, frame func(page.Addr) (uint64, error)) (out []page.Range, err error) {
	next := make(map[page.Addr][]seenPage, len(t.seen))
	for i := range maps {
		m := &maps[i]
		if !private(m) {
			continue
		}
		// Holes cost nothing: a mapping may be much larger than what is in it.
		at := m.Start
		for _, c := range content.Intersect(m.Range) {
			for c.Start = max(c.Start, at); !c.Empty(); c.Start = at {
				at = min(m.End, (c.Start/tableBytes+1)*tableBytes)
				part := page.Range{Start: max(m.Start, c.Start/tableBytes*tableBytes), End: at}
				own := content.Intersect(part)
				list, same, err := t.look(part, own, dirty, frame)
				if err != nil {
					return nil, err
				}
				if !same {
					out = append(out, own...)
				}
				next[part.Start] = list
			}
		}
	}
	t.seen = next
	return out, nil
}

func (t *tables) look(part page.Range, own []page.Range, dirty *page.Set, frame func(page.Addr) (uint64, error)) (list []seenPage, same bool, err error) {
	in := page.NewSet(own...)
	have := map[page.Addr]bool{}
	for _, p := range t.seen[part.Start] {
		if !in.Contains(p.at) || dirty.Contains(p.at) {
			continue
		}
		f, err := frame(p.at)
		if err != nil {
			return nil, false, err
		}
		if f != 0 && f == p.frame {
			list, same, have[p.at] = append(list, p), true, true
		}
	}
	for k := page.Addr(0); k < watched && len(list) < watched; k++ {
		// Not at even distances: programs write at such.
		want := part.Start + page.Addr(part.Bytes())/watched*k + (2*k*k+k+1)*page.Size
		for _, r := range own {
			if r.End <= want {
				continue
			}
			at := max(r.Start, want.Floor())
			if !have[at] {
				f, err := frame(at)
				if err != nil {
					return nil, false, err
				}
				list, have[at] = append(list, seenPage{at, f}), true
			}
			break
		}
	}
	if len(list) == 0 { // a few pages at the begin
		f, err := frame(own[0].Start)
		return []seenPage{{own[0].Start, f}}, same, err
	}
	return list, same, nil
}
