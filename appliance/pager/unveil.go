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
	for _, g := range m.Ranges {
		gone := v.src.AllGivenUp(g)
		r.GivenUp = page.Union(&r.GivenUp, &gone)
	}
	if m.PID != v.pid {
		return r, nil
	}
	for _, sp := range v.src.Spaces() {
		if !sp.Forked() && sp.Lock() {
			err = errors.Join(err, v.release(sp, &m))
			sp.Unlock()
		}
	}
	at := page.NewSet(m.At...)
	if !m.Again && !m.Early {
		v.veil.Settled(m.PID, at)
	}
	return r, err
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
			if m.Shadows[i] == 0 && o.r == shadow || m.Early && o.r != shadow {
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
		if !m.Again {
			c.Unmap(shadow)
		}
	}
	return errors.Join(err, c.Commit(0))
}
