package image

import (
	"slices"

	"github.com/pageferry/pageferry/page"
)

// MaxInlineMemory is the most bytes of a shared memory object that are carried
// inside the image; what is larger travels with the pages.
const MaxInlineMemory = 1 << 20

// Memory says which pages of one address space have content, and how each must
// reach the destination. The first two do not overlap; all are page aligned. What is
// in none of them is a hole (zeros) or comes from a file there.
type Memory struct {
	Space page.Space
	// Lazy pages may arrive after the process runs: userfaultfd traps them.
	Lazy page.Set
	// Eager pages must be in place before it runs, because nothing would trap
	// an access: changed pages of private file mappings, and of shared memory
	// that is reachable by a descriptor or through two mappings.
	Eager page.Set
	// Hot pages are part of Lazy. The kernel or the program touches them at
	// once (rseq areas, robust lists, stack tops): send them first.
	Hot page.Set
	// Guards are where an access is a fault of the program (MADV_GUARD_INSTALL),
	// inside mappings of the kind VMAAnon.
	Guards page.Set
	// Dirty are pages that may differ from what a destination was sent of them
	// before. Pages of Lazy and Eager that it has and that are not in Dirty need
	// not come again.
	Dirty page.Set
}

// stored are those that are kept in a file.
func (m *Memory) stored() []*page.Set {
	return []*page.Set{&m.Lazy, &m.Eager, &m.Hot, &m.Guards}
}

// sets are all of them.
func (m *Memory) sets() []*page.Set {
	return []*page.Set{&m.Lazy, &m.Eager, &m.Hot, &m.Guards, &m.Dirty}
}

// Join returns the maps of a and b as one for each space: what each says holds.
// The sets of a and b do not overlap. Neither is changed; the result may share
// memory with them.
func Join(a, b []Memory) []Memory {
	out := append([]Memory(nil), a...)
	for i := range b {
		k := slices.IndexFunc(out, func(m Memory) bool { return m.Space == b[i].Space })
		if k < 0 {
			out = append(out, b[i])
			continue
		}
		from := b[i].sets()
		for j, s := range out[k].sets() {
			*s = page.Union(s, from[j])
		}
	}
	return out
}
