package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Domain is the protection domain of an RDMA device that we have open, as the
// kernel knows it.
type Domain struct {
	// File is the uverbs device: a copy of the descriptor that the domain is of.
	File *os.File
	// Driver is enum rdma_driver_id of the device, ID the handle of the domain.
	Driver, ID uint32
	// MaxRegions is how many regions to make at most; 0 means 4096, which is also
	// the most. Each takes memory of the device, and time.
	MaxRegions int
}

const maxRegions = 4096

// Region is a range of the process's memory that peers of the device may read, and
// nobody may write by it. The kernel deregisters Handle by the descriptor that the
// domain is of.
type Region struct {
	page.Range
	Handle, Key uint32
}

// Refusal is a range that the kernel or the device would not register.
type Refusal struct {
	Range page.Range
	Err   error // names the range, too
}

// Registration is what came of Register.
type Registration struct {
	Regions []Region // in order of address
	Refused []Refusal
	// Left are those of the pages that no region has: for ReadPages. They were
	// refused, would have been regions too many, or were left alone.
	Left page.Set
}

// Register makes the process register pages of its own memory with an RDMA device
// of ours, so that a peer reads them one-sided. The process must be frozen, and not
// held yet: it is the process that makes the calls. It must not run again before
// the regions have been deregistered. Registering takes the time of a walk over the
// pages, and all of it is downtime.
//
// Only what is in memory already, is read without a copy being made, and may be read
// by the program, becomes part of a region: registering the rest would allocate
// memory here. Left alone are holes, zero pages, pages of files that the
// process has not changed, what it shares with another process since a fork or by
// KSM, what is swapped out, PROT_NONE and write-only mappings and what the kernel maps ([vdso]).
// Pages that touch are one region, whatever mappings they are of. Where there are
// more runs of pages than there may be regions, the longest are taken.
//
// The pages count as locked and pinned (VmPin), beyond RLIMIT_MEMLOCK, which is
// raised for the calls and put back by the last of them. They stay until the region
// is deregistered, whatever becomes of the process or its mappings. With an error
// nothing is known to be registered; what may be ends when d.File and the descriptor
// that it is a copy of are closed. inject.ErrSeccomp says that a filter would judge
// the calls, and ErrState that the process is not frozen, or held.
//
// Nothing else of the process changes. But soft-dirty bits cannot be trusted while
// there are regions: clear_refs passes over pinned pages (pte_is_pinned,
// fs/proc/task_mmu.c), and kernels before 6.2 pin as if they wrote. Write protection
// by userfaultfd can.
//
// A kill of this program, at any moment:
//
//   - before the batch begins: the limit is as it was, no descriptor is there
//   - from then on the process goes through the batch by itself, and none of its other
//     threads runs before that is over (inject, RunAlone). Before the descriptor was
//     sent it waits for that in vain (registerWait), registers nothing, puts its limit
//     back and closes what it has opened. After that it registers, and closes
//     the descriptor at the end as well
//   - either way the process ends up without the device, and our copies are closed by
//     our death: with the last copy the kernel ends all regions and unpins the pages
//   - after the batch nothing in the process keeps anything but, as after any such
//     kill, the mapping that the calls were made from
//
// A kill of the process ends its copies. Its regions are ours, and stay.
func (s *Session) Register(ctx context.Context, d Domain, pages page.Set) (Registration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reg, err := s.register(ctx, d, pages)
	if err != nil {
		return Registration{}, &Error{"register memory of", s.pid, gone(s.pid, err)}
	}
	return reg, nil
}

func (s *Session) register(ctx context.Context, d Domain, pages page.Set) (reg Registration, err error) {
	if err := s.usable(); err != nil {
		return reg, err
	}
	if len(s.threads) == 0 || s.held {
		return reg, fmt.Errorf("%w: not frozen, or held", ErrState)
	}
	most := maxRegions
	if d.MaxRegions > 0 {
		most = min(most, d.MaxRegions)
	}
	rs, err := s.registrable(longest(pages.Ranges(), most))
	if err != nil {
		return reg, err
	}
	if rs = longest(rs, most); len(rs) > 0 {
		if err := s.registerAll(ctx, d, rs, &reg); err != nil {
			return reg, err
		}
	}
	got := make([]page.Range, len(reg.Regions))
	for i := range reg.Regions {
		got[i] = reg.Regions[i].Range
	}
	in := page.NewSet(got...)
	reg.Left = page.Difference(&pages, &in)
	return reg, nil
}

// longest chooses at most n of rs, in order of address.
func longest(rs []page.Range, n int) []page.Range {
	if len(rs) <= n {
		return rs
	}
	rs = slices.Clone(rs)
	slices.SortFunc(rs, func(a, b page.Range) int { return cmp.Compare(b.Bytes(), a.Bytes()) })
	rs = rs[:n]
	slices.SortFunc(rs, func(a, b page.Range) int { return cmp.Compare(a.Start, b.Start) })
	return rs
}

// registrable finds what of rs, in order of address, can be registered and takes
// no memory by that.
func (s *Session) registrable(rs []page.Range) ([]page.Range, error) {
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		return nil, err
	}
	pm, err := proc.OpenPagemap(s.pid)
	if err != nil {
		return nil, err
	}
	defer pm.Close()
	var found page.Set
	for i, j := 0, 0; i < len(maps) && j < len(rs); {
		m, part := &maps[i], rs[j].Intersect(maps[i].Range)
		// A small hole costs less than another call.
		for ; j+1 < len(rs) && rs[j+1].Start < m.End && rs[j+1].Start-rs[j].End < walkOver && !part.Empty(); j++ {
			part.End = min(rs[j+1].End, m.End)
		}
		if !part.Empty() && m.Prot&unix.PROT_READ != 0 && !strings.HasPrefix(m.Name, "[v") {
			if err := pm.Resident(part, m.Shared, found.Add); err != nil {
				return nil, err
			}
		}
		if m.End < rs[j].End {
			i++
		} else {
			j++
		}
	}
	asked := page.NewSet(rs...)
	found = page.Intersection(&found, &asked)
	return found.Ranges(), nil
}

// walkOver is up to which size a hole is walked as well.
const walkOver = 64 * page.Size

// registerError says what an errno of REG_MR means.
func registerError(r page.Range, err error) error {
	why := ""
	switch {
	case errors.Is(err, unix.ENOMEM):
		why = " (the host or the device has no memory for it, or RLIMIT_MEMLOCK could not be raised as far: that takes CAP_SYS_RESOURCE)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		why = " (the process may not)"
	case errors.Is(err, unix.EFAULT):
		why = " (the kernel gives devices no memory of this kind)"
	case errors.Is(err, unix.EOPNOTSUPP):
		why = " (neither this file system nor the device allows it)"
	case errors.Is(err, unix.EINVAL):
		why = " (the driver wants to be told more, or takes no such memory)"
	case errors.Is(err, unix.ENOTTY):
		why = " (it needs Linux 5.0 or later)"
	case errors.Is(err, unix.EAGAIN):
		why = " (the rdma controller of its cgroup has a limit)"
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENODEV):
		why = " (the device is gone)"
	}
	return fmt.Errorf("%v of process memory: %w%s", r, err, why)
}
