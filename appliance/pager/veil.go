package pager

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/fxamacker/cbor/v2"
	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// veiled is the part of a pager that serves veiled memory.
type veiled struct {
	*image
	s     *server
	group cgroup.Group
	pid   int
	veil  *fault.Veil
	ahead *ahead
}

// newVeiled takes up veiled memory of src, whose userfaultfds the store lists.
func (s *server) newVeiled(src *pagestore.Source, pid, mem int, group string, views []View) (*veiled, error) {
	v := &veiled{
		image: &image{views: views, src: src, mem: mem, remote: s.fetch.Source(src.ID())},
		s:     s, group: cgroup.At(group), pid: pid,
	}
	v.ahead = newAhead(v)
	ranges := make([]page.Range, len(views))
	for i := range views {
		ranges[i] = views[i].Range
	}
	saved, err := readVeil(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	v.veil, err = fault.NewVeil(fault.VeilConfig{
		Source: src, PID: pid, Views: page.NewSet(ranges...), Processes: v.group.AllProcs, Locate: v.locate, Shows: v.shows, Invalidate: v.invalidate, Own: v.own, Blank: v.zero,
		Freeze: v.group.BeginFreeze, Thaw: v.group.Thaw, Frozen: v.group.Frozen, Save: s.saveVeil, Saved: saved, Log: s.log,
	})
	return v, err
}

// eachView calls f for what of the image process pid has mapped in r: where, and which
// addresses of the source it shows.
func (v *veiled) eachView(pid int, r page.Range, f func(at, src page.Range)) error {
	dev, ino := v.s.fs.ImageID()
	err := proc.EachMapping(pid, r, func(m proc.Piece) {
		if m.Dev == dev && m.Ino == ino {
			at := m.Range.Intersect(r)
			start := page.Addr(m.Offset) + at.Start - m.Start
			f(at, page.Range{Start: start, End: start + page.Addr(at.Bytes())})
		}
	})
	if errors.Is(err, proc.ErrGone) {
		return nil
	}
	return err
}

// locate is fault.VeilConfig.Locate.
func (v *veiled) locate(pid int, r page.Range) (src []page.Range, one bool, err error) {
	err = v.eachView(pid, r, func(_, from page.Range) { src = append(src, from) })
	return src, len(src) <= 1, err
}

// shows is fault.VeilConfig.Shows.
func (v *veiled) shows(pid int, src page.Range) (at, from []page.Range, err error) {
	err = v.eachView(pid, page.Range{End: 1 << 47}, func(r, s page.Range) {
		if here := s.Intersect(src); !here.Empty() {
			start := r.Start + (here.Start - s.Start)
			at = append(at, page.Range{Start: start, End: start + page.Addr(here.Bytes())})
			from = append(from, here)
		}
	})
	return at, from, err
}

// invalidate makes the page cache forget the pages of the image that are src.
func (v *veiled) invalidate(src page.Range) error {
	v.ahead.drain()
	return v.s.fs.InvalidateImage(uint64(src.Start), src.Bytes())
}

// own gives a process copies of its own of the pages at r: to write a byte of what
// they hold is all it takes, the kernel makes the copy. Nobody else writes there: the
// process stands still, or does not know r yet. What has no content is zero anyway.
func (v *veiled) own(pid int, r page.Range) error {
	return v.write(pid, r, func(f int, at page.Addr) error {
		var b [1]byte
		if _, err := unix.Pread(f, b[:], int64(at)); err != nil {
			return err
		}
		_, err := unix.Pwrite(f, b[:], int64(at))
		return err
	})
}

// zero makes the pages at r of a process zero: new memory, behind which the file goes
// on.
func (v *veiled) zero(pid int, r, _ page.Range) error {
	var none [page.Size]byte
	return v.write(pid, r, func(f int, at page.Addr) error {
		_, err := unix.Pwrite(f, none[:], int64(at))
		return err
	})
}

// write calls f for every page at r of a process that shows content of the source.
func (v *veiled) write(pid int, r page.Range, f func(mem int, at page.Addr) error) error {
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has ended
	}
	if err != nil {
		return err
	}
	defer mem.Close()
	var failed error
	err = v.eachView(pid, r, func(at, src page.Range) {
		v.src.Each(src, func(p page.Range, first int) {
			for a, i := p.Start, first; a < p.End && failed == nil; a, i = a+page.Size, i+1 {
				if !v.src.GivenUp(i) {
					failed = f(int(mem.Fd()), at.Start+(a-src.Start))
				}
			}
		})
	})
	if errors.Is(failed, unix.ESRCH) {
		failed = nil
	}
	return errors.Join(err, failed)
}

const veilName = "pager.veil"

// saveVeil is fault.VeilConfig.Save. The directory is one that does not outlive this
// host's running (tmpfs), nor need it.
func (s *server) saveVeil(st fault.VeilState) error {
	b, err := cbor.Marshal(st)
	if err != nil {
		return err
	}
	path := filepath.Join(s.cfg.Dir, veilName)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("pager: %w", err)
	}
	return os.Rename(path+".new", path)
}

func readVeil(dir string) (st fault.VeilState, err error) {
	b, err := os.ReadFile(filepath.Join(dir, veilName))
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err == nil {
		err = cbor.Unmarshal(b, &st)
	}
	if err != nil {
		err = fmt.Errorf("pager: what is known of the program's memory: %w", err)
	}
	return st, err
}
