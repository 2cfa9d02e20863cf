package checkpoint

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// maxUnmapped is the most bytes of shared memory that no shared mapping shows
// and that therefore travel inside the image.
const maxUnmapped = 64 << 20

// memory sorts the pages with content into those that may come later, those that
// must not, and those that are needed at once. found is what is outside anonymous
// mappings.
func (c *capture) memory(found content) (image.Memory, error) {
	lazy, eager := c.sort(found.own)
	for _, r := range c.orphans {
		lazy.Add(r)
	}
	for i := range c.img.Memories {
		if i >= len(c.data) {
			break // only descriptors hold those: checkpoint/fds carries them
		}
		l, e, err := c.shared(i)
		if err != nil {
			return image.Memory{}, err
		}
		for _, r := range l {
			lazy.Add(r)
		}
		eager = append(eager, e...)
	}
	return c.settled(lazy, eager, found.guards), nil
}

// anonymous is that for what is in anonymous mappings.
func (c *capture) anonymous(found content) image.Memory {
	lazy, eager := c.sort(found.own)
	return c.settled(lazy, eager, found.guards)
}

// sort goes by the mappings that pages lie in. Where all are lazy, as nearly
// always in anonymous memory, it returns own itself.
func (c *capture) sort(own page.Set) (lazy page.Set, eager []page.Range) {
	vmas := c.p.VMAs
	left := own.Bytes()
	for i := range vmas {
		if isLazy(&vmas[i]) {
			left -= own.BytesIn(vmas[i].Range)
		}
	}
	if left == 0 {
		return own, nil
	}
	i := 0
	for _, r := range own.Ranges() {
		for i < len(vmas) && vmas[i].End <= r.Start {
			i++
		}
		for j := i; j < len(vmas) && vmas[j].Start < r.End; j++ {
			v := &vmas[j]
			switch part := v.Intersect(r); {
			case isLazy(v):
				lazy.Add(part)
			case v.Has("dp"):
			case v.Kind == image.VMAFile, v.Kind == image.VMADevice, v.Kind == image.VMAShared && !v.Shared:
				eager = append(eager, part)
			}
		}
	}
	return lazy, eager
}

// isLazy reports whether pages in v may come later. Of droppable memory none
// comes: the program is prepared to find zeros at any moment, and a userfaultfd
// does not register there.
func isLazy(v *image.VMA) bool { return v.Kind == image.VMAAnon && !v.Has("dp") }

// settled makes pages eager that the end of a thread needs, and finds the hot
// ones.
func (c *capture) settled(lazy page.Set, eager []page.Range, guards page.Set) image.Memory {
	m := image.Memory{Lazy: lazy}
	for _, r := range c.atExit() {
		eager = append(eager, m.Lazy.Remove(r)...)
	}
	m.Eager = page.NewSet(eager...)
	m.Hot = c.hot(&m.Lazy)
	var inside []page.Range
	for i := range c.p.VMAs {
		if v := &c.p.VMAs[i]; v.Kind == image.VMAAnon {
			inside = append(inside, guards.Intersect(v.Range)...)
		}
	}
	m.Guards = page.NewSet(inside...)
	return m
}

// shared finds the pages by which the content of object i can be read and put
// back. Only one mapping carries each page.
func (c *capture) shared(i int) (lazy, eager []page.Range, err error) {
	data := page.NewSet(c.data[i]...)
	if data.Empty() {
		return nil, nil, nil
	}
	var views []*image.VMA
	for j := range c.p.VMAs {
		if v := &c.p.VMAs[j]; v.Kind == image.VMAShared && v.Memory == i {
			views = append(views, v)
		}
	}
	// What another mapping shows is not a window's.
	slices.SortStableFunc(views, func(a, b *image.VMA) int { return cmp.Compare(last(a), last(b)) })
	// Only where a page has one way to be reached does the trap see all access.
	late := len(views) == 1 && views[0].Shared && !c.hasDescriptor(i)
	for _, v := range views {
		if !v.Shared {
			continue
		}
		window := page.Range{Start: page.Addr(v.Offset), End: page.Addr(v.Offset + v.Bytes())}
		for _, d := range data.Remove(window) {
			r := page.Range{Start: v.Start + d.Start - window.Start, End: v.Start + d.End - window.Start}
			if late {
				lazy = append(lazy, r)
			} else {
				eager = append(eager, r)
			}
		}
	}
	return lazy, eager, c.unmapped(i, &data, views)
}

func last(v *image.VMA) int {
	if v.Window {
		return 1
	}
	return 0
}

// hasDescriptor reports whether a descriptor of the process leads to object i.
func (c *capture) hasDescriptor(i int) bool {
	for j := range c.img.Files {
		if f := &c.img.Files[j]; f.Kind == image.FileMemFD && f.Memory == i {
			return true
		}
	}
	return false
}

// unmapped puts what no shared mapping shows into the image. Of an object with a
// descriptor checkpoint/fds has done so already, but for what private mappings
// show: those have the process's changes in place of the object's own pages.
func (c *capture) unmapped(i int, rest *page.Set, views []*image.VMA) error {
	var want []page.Range
	for _, v := range views {
		if !v.Shared || !c.hasDescriptor(i) {
			window := page.Range{Start: page.Addr(v.Offset), End: page.Addr(v.Offset + v.Bytes())}
			want = append(want, rest.Remove(window)...)
		}
	}
	if !c.hasDescriptor(i) {
		want = append(want, rest.Ranges()...)
	}
	if len(want) == 0 {
		return nil
	}
	set := page.NewSet(want...)
	o := &c.img.Memories[i]
	if set.Bytes() > maxUnmapped {
		c.refuse("%d MiB of shared memory %q are not mapped shared anywhere", set.Bytes()>>20, o.Name)
		return nil
	}
	f, err := c.s.openMapped(views[0].Range)
	if err != nil {
		return err
	}
	defer f.Close()
	chunks, err := readChunks(f, set.Ranges(), o.Size)
	if err != nil {
		return fmt.Errorf("read shared memory %q: %w", o.Name, err)
	}
	o.Chunks = mergeChunks(o.Chunks, chunks)
	return nil
}

// hot are the lazy pages that a thread or the kernel touches first.
func (c *capture) hot(lazy *page.Set) page.Set {
	var hot []page.Range
	add := func(a uint64) {
		if a != 0 && lazy.Contains(page.Addr(a)) {
			hot = append(hot, page.PageOf(page.Addr(a)))
		}
	}
	for i := range c.p.Threads {
		t := &c.p.Threads[i]
		add(t.Regs.RSP)
		add(t.Regs.FSBase)
		add(t.Rseq.Ptr)
		add(t.Robust)
		add(t.ClearTID)
	}
	return page.NewSet(hot...)
}
