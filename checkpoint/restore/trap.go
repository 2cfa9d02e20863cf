package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// droppable takes out of m what lies in mappings that the kernel may empty at any
// moment: no userfaultfd can trap those, and their programs are prepared to find
// zeros (vgetrandom keeps its state in one).
func droppable(p *image.Process, m *image.Memory) *image.Memory {
	out := &image.Memory{Space: m.Space, Lazy: m.Lazy, Eager: m.Eager, Hot: m.Hot, Guards: m.Guards, Dirty: m.Dirty}
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if !v.Has("dp") {
			continue
		}
		for _, s := range []*page.Set{&out.Lazy, &out.Eager, &out.Hot} {
			if s.BytesIn(v.Range) > 0 {
				*s = s.Clone()
				s.Remove(v.Range)
			}
		}
	}
	return out
}

// planRegions says how the content of each mapping gets into it. A mapping with
// no content to come is no region: it stays ordinary memory, that nobody traps.
func planRegions(p *image.Process, m *image.Memory, from elsewhere) ([]Region, error) {
	var rs []Region
	var lazy, eager, guards uint64
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Kind == image.VMAVsyscall {
			continue
		}
		l, e := m.Lazy.BytesIn(v.Range), m.Eager.BytesIn(v.Range)
		lazy, eager = lazy+l, eager+e
		if v.Kind == image.VMAAnon {
			guards += m.Guards.BytesIn(v.Range)
		}
		switch {
		case l > 0 && v.Kind != image.VMAAnon && v.Kind != image.VMAShared && v.Kind != image.VMADevice:
			return nil, about(fmt.Errorf("%w: lazy pages in a mapping that cannot be trapped", image.ErrFormat), "mapping %v %s", v.Range, v.Path)
		case l > 0:
			rs = append(rs, Region{Range: v.Range, Kind: RegionUFFD, Shared: v.Shared})
		case e > 0:
			r := Region{Range: v.Range, Kind: RegionWrite, Shared: v.Shared}
			if _, ok := from[v.MappedFile-1]; ok && v.Kind == image.VMAFile {
				r.File, r.Offset = v.MappedFile, v.Offset
			}
			rs = append(rs, r)
		}
	}
	if lazy != m.Lazy.Bytes() || eager != m.Eager.Bytes() || guards != m.Guards.Bytes() {
		return nil, fmt.Errorf("%w: content outside the mappings", image.ErrFormat)
	}
	return rs, nil
}

// uffdFeatures are those of every trapped process. The events tell of memory
// that the process gives up, moves or shares with a child while pages are
// missing.
const uffdFeatures = sys.UffdFeatureEventFork | sys.UffdFeatureEventRemap | sys.UffdFeatureEventRemove |
	sys.UffdFeatureEventUnmap | sys.UffdFeatureMissingShmem

// register makes of the userfaultfd that the process has as number fd one of
// ours, with all regions that need it.
func register(pidfd, fd int, rs []Region) (_ *os.File, err error) {
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_getfd of the userfaultfd: %w", err)
	}
	f := os.NewFile(uintptr(n), "userfaultfd")
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if _, _, err := sys.UffdAPI(n, uffdFeatures); err != nil {
		return nil, fmt.Errorf("userfaultfd: features %#x: %w (needs Linux 4.14 and CAP_SYS_PTRACE)", uffdFeatures, err)
	}
	for i := 0; i < len(rs); {
		r := rs[i]
		i++
		if r.Kind != RegionUFFD {
			continue
		}
		// Neighbours that touch go in one request.
		at := r.Place()
		for i < len(rs) && rs[i].Kind == RegionUFFD && rs[i].Place().Start == at.End {
			at.End = rs[i].Place().End
			i++
		}
		if _, err := sys.UffdRegister(n, uint64(at.Start), at.Bytes(), sys.UffdioRegisterModeMissing); err != nil {
			return nil, about(fmt.Errorf("userfaultfd: register: %w", err), "mapping %v", at)
		}
	}
	return f, nil
}

// adopt hands the memory to the trap.
func (r *rebuild) handOver() error {
	a := Adoption{PID: r.target.pid, Regions: r.regions, Memory: *r.m, Veil: r.veilFD, Views: r.views}
	r.veilFD = nil
	for _, v := range r.views {
		for _, g := range r.kept.Intersect(v.Range) {
			a.Kept.Add(g)
		}
	}
	var err error
	if r.uffd >= 0 {
		if a.UFFD, err = register(r.pidfd, r.uffd, r.regions); err != nil {
			return errors.Join(err, a.Close())
		}
	}
	if a.Mem, err = os.OpenFile(fmt.Sprintf("/proc/%d/mem", a.PID), os.O_RDWR, 0); err != nil {
		return errors.Join(err, a.Close())
	}
	if err := r.trap.Adopt(r.ctx, a); err != nil {
		return fmt.Errorf("trap: %w", err)
	}
	return nil
}

// Close closes the descriptors in a.
func (a *Adoption) Close() (err error) {
	for _, f := range []*os.File{a.UFFD, a.Mem, a.Veil} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}
