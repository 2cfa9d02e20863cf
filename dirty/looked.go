package dirty

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// looked is what a look found in one run.
type looked struct {
	found
	gone []page.Range // what was known of these is not so any more
}

func (l *looked) lost(r page.Range) { l.gone = join(l.gone, r) }

// changed finds what is not as it was at the look before, in a run of which that
// is known. What it does not tell has content if it had some then: as long as a
// mapping stays registered, nothing gets into it or out of it but through its page
// tables, where what is missing and what is new can be seen. A mapping that takes
// the place of another is not registered.
func (l *looked) changed(pm *proc.Pagemap, r *run, protect bool) error {
	if err := pm.Changed(r.Range, protect, l.addWritten, l.lost, l.addGuard); err != nil {
		return err
	}
	if len(l.gone) > 0 && protect {
		// What was given up after it was found written.
		w, g := page.NewSet(l.written...), page.NewSet(l.gone...)
		w = page.Difference(&w, &g)
		l.written = w.Ranges()
	}
	return nil
}

// fewBytes is how much a mapping has at least for two walks that tell little to
// cost less than one that tells all.
const fewBytes = 32 * page.Size

// mostHoles is how many holes a run has at most for its pages to be protected piece
// by piece: a call costs as much as to tell of 100 pages.
const mostHoles = 64

// take looks at a run of which nothing is known. first says that none of it was
// looked at before.
func (l *looked) take(pm *proc.Pagemap, r *run, first bool) error {
	if first && r.anon && len(r.maps) < mostHoles {
		if done, err := l.arm(pm, r); done || err != nil {
			return err
		}
	}
	return pm.Take(r.Range, r.anon, proc.Walk{Content: l.addContent, Written: l.addWritten, Guard: l.addGuard})
}

// arm is the first look at a run, for which all content counts as written: the
// kernel need tell neither. To ask it for the holes and to protect what is between
// them takes less time than to have it tell what it protects.
func (l *looked) arm(pm *proc.Pagemap, r *run) (done bool, err error) {
	var out []page.Range // not registered, or without content
	add := func(r page.Range) { out = append(out, r) }
	if err := pm.Untracked(r.Range, true, add, nil, nil); err != nil {
		return false, err
	}
	var guards []page.Range
	swapped := false
	err = pm.Lacking(r.Range, add, func(r page.Range) { guards = append(guards, r) }, func(page.Range) { swapped = true })
	if err != nil || swapped || len(out)+len(r.maps) > mostHoles {
		return false, err
	}
	holes := page.NewSet(out...)
	for i := range r.maps {
		for _, piece := range holes.Gaps(r.maps[i].Intersect(r.Range)) {
			if err := pm.Protect(piece); err != nil {
				return false, err
			}
			l.addContent(piece)
		}
	}
	for _, g := range guards {
		l.addGuard(g)
	}
	return true, nil
}
