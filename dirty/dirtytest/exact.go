package dirtytest

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Last is Round for a process that stands still, by the look that is made for that.
func (s *Shadow) Last() dirty.Pages {
	s.t.Helper()
	return s.look(s.track.Last)
}

// Exact compares what the last look told to be content and guards with a walk of
// all page tables of anonymous memory, which knows nothing of earlier looks. The
// process must not have changed since.
func (s *Shadow) Exact() error {
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		return err
	}
	return s.exact(maps)
}

func (s *Shadow) exact(maps []proc.Mapping) error {
	pm, err := proc.OpenPagemap(s.pid)
	if err != nil {
		return err
	}
	defer pm.Close()
	var content, guards, where page.Set
	for i := range maps {
		m := &maps[i]
		if m.Shared || m.Ino != 0 || len(m.Name) > 1 && m.Name[:2] == "[v" || m.Has("dp") {
			continue
		}
		where.Add(m.Range)
		if err := pm.Find(m.Range, true, content.Add, guards.Add); err != nil {
			return err
		}
	}
	differ := func(what string, got, want *page.Set) error {
		got2 := page.Intersection(got, &where)
		more, less := page.Difference(&got2, want), page.Difference(want, &got2)
		if more.Empty() && less.Empty() {
			return nil
		}
		return fmt.Errorf("%s: %v told and not there, %v there and not told", what, more.Ranges(), less.Ranges())
	}
	return errors.Join(differ("content", &s.last.Content, &content), differ("guards", &s.last.Guards, &guards))
}
