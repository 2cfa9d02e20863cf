package dirty

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// mostHoles is how many holes a run has at most for its pages to be protected piece
// by piece: a call costs as much as to tell of 100 pages.
const mostHoles = 64

// take looks at a run of which nothing is known.
func (t *wp) take(r *run, f *found) error {
	if !t.seen && r.anon && len(r.maps) < mostHoles {
		if done, err := t.arm(r, f); done || err != nil {
			return err
		}
	}
	return t.pm.Take(r.Range, r.anon, proc.Walk{Content: f.addContent, Written: f.addWritten, Guard: f.addGuard})
}

// arm is the first look at a run, for which all content counts as written: the
// kernel need tell neither. To ask it for the holes and to protect what is between
// them takes less time than to have it tell what it protects.
func (t *wp) arm(r *run, f *found) (done bool, err error) {
	var out []page.Range // not registered, or without content
	add := func(r page.Range) { out = append(out, r) }
	if err := t.pm.Untracked(r.Range, true, add, nil, nil); err != nil {
		return false, err
	}
	var guards []page.Range
	swapped := false
	err = t.pm.Lacking(r.Range, add, func(r page.Range) { guards = append(guards, r) }, func(page.Range) { swapped = true })
	if err != nil || swapped || len(out)+len(r.maps) > mostHoles {
		return false, err
	}
	holes := page.NewSet(out...)
	for i := range r.maps {
		for _, piece := range holes.Gaps(r.maps[i].Intersect(r.Range)) {
			if err := t.pm.Protect(piece); err != nil {
				return false, err
			}
			f.addContent(piece)
		}
	}
	for _, g := range guards {
		f.addGuard(g)
	}
	return true, nil
}
