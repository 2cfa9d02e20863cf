package pager

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// unveil lets go of what is about to be replaced, and of the shadows that replace it.
// The process stands still. Of a forked child the userfaultfds are not known by its
// pid: there everything stays trapped, and comes as events.
func (s *server) unveil(m unveilMsg) (r veilReply, err error) {
	v := s.veiled.Load()
	if v == nil || len(m.Ranges) != len(m.Shadows) || len(m.Ranges) != len(m.At) {
		return r, errors.New("pager: nothing is veiled")
	}
	if m.Early && m.PID != v.pid {
		return r, fmt.Errorf("pager: nothing is known of the shadows of process %d", m.PID)
	}
	if m.Early || m.Again || m.Certain {
		return r, v.letGo(&m)
	}
	asked := false
	ok, err := v.veil.Quiet(func() error {
		if asked = v.asPlanned(&m); !asked {
			return nil
		}
		for _, g := range m.Ranges {
			gone := v.src.AllGivenUp(g)
			r.GivenUp = page.Union(&r.GivenUp, &gone)
		}
		return v.letGo(&m)
	})
	r.Busy = !ok || !asked
	return r, err
}

// asPlanned reports whether what m says of shadows holds still: the process may have
// moved and grown mappings since that was planned, and where one has grown the image does
// not count.
func (v *veiled) asPlanned(m *unveilMsg) bool {
	for i, at := range m.At {
		own := v.veil.Own(m.PID, at)
		if m.Shadows[i] != 0 && (!own.Empty() || !v.veil.Expected(m.PID, at, m.Ranges[i])) {
			return false
		}
		if m.Shadows[i] != 0 {
			continue
		}
		for _, r := range own.Gaps(at) {
			start := m.Ranges[i].Start + (r.Start - at.Start)
			content := v.src.NotGivenUp(page.Range{Start: start, End: start + page.Addr(r.Bytes())})
			if content {
				return false
			}
		}
	}
	return true
}

// letGo does what m says with the userfaultfds.
func (v *veiled) letGo(m *unveilMsg) (err error) {
	if m.PID != v.pid {
		return nil
	}
	for _, sp := range v.src.Spaces() {
		if !sp.Forked() && sp.Lock() {
			err = errors.Join(err, v.release(sp, m))
			sp.Unlock()
		}
	}
	if m.Again {
		for i, at := range m.At {
			v.veil.Again(m.PID, at, m.Ranges[i])
		}
	}
	if m.Certain {
		v.veil.Settled(m.PID, page.NewSet(m.At...))
	}
	return err
}

// release registers nothing of m any more with the userfaultfds, or all of it again.
// The space is locked.
func (v *veiled) release(sp *pagestore.Space, m *unveilMsg) (err error) {
	c := sp.Begin()
	for i, at := range m.At {
		shadow := page.Range{Start: m.Shadows[i], End: m.Shadows[i] + page.Addr(at.Bytes())}
		for _, o := range []struct {
			fd   int
			r    page.Range
			mode uint64
		}{{v.src.VeilFDs()[0], at, sys.UffdioRegisterModeWP}, {sp.FD(), shadow, sys.UffdioRegisterModeMissing}} {
			if m.Shadows[i] == 0 && o.r == shadow || !m.Again && m.Certain == (o.r == shadow) {
				continue
			}
			var e error
			if m.Again {
				_, e = sys.UffdRegister(o.fd, uint64(o.r.Start), o.r.Bytes(), o.mode)
			} else {
				e = sys.UffdUnregister(o.fd, uint64(o.r.Start), o.r.Bytes())
			}
			// ENOMEM: it is not there; whoever wants to replace it will see that.
			if e != nil && e != unix.ENOMEM {
				err = errors.Join(err, fmt.Errorf("pager: let go of %v: %w", o.r, e))
			}
		}
		if !m.Again && !m.Certain {
			c.Unmap(shadow)
		}
	}
	return errors.Join(err, c.Commit(0))
}
