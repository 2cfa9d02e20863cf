package restore

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// View is veiled memory: at Range the process has a private mapping of the file
// Config.Image, from offset Start on, in the place of its anonymous memory. That lies,
// of the same size, in a shadow behind it: there its pages arrive, and from there the
// file has its content.
//
// Offsets are addresses, so that neighbours are one mapping for the kernel where they
// were one as anonymous memory, or become alike (mprotect).
type View struct {
	page.Range
	Shadow page.Addr
}

// veilFeatures are those of the userfaultfd that tells what the process does to
// veiled memory: see fault.Veil.
const veilFeatures = sys.UffdFeatureWPAsync | sys.UffdFeaturePagefaultFlagWP | sys.UffdFeatureWPUnpopulated |
	sys.UffdFeatureEventRemove | sys.UffdFeatureEventRemap | sys.UffdFeatureEventUnmap | sys.UffdFeatureEventFork

// veil puts the file in the place of anonymous memory that pages are to come in. Not
// everything can be veiled: no file is mapped as a stack that grows, wiped on fork,
// or locked before it is there; guards would hide what comes behind them; and a shadow
// of memory that nobody may touch, mostly a large reserve, would count as in use.
func (r *rebuild) veil() error {
	if r.cfg.Image == "" || r.uffd < 0 {
		return nil
	}
	views, err := r.chooseViews()
	if err != nil || len(views) == 0 {
		return err
	}
	s := newScript(r.target.t)
	s.onf("file of the memory, %s", r.cfg.Image)
	made := s.call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK)
	open := s.call(unix.SYS_OPENAT, atFDCWD, s.String(r.cfg.Image), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	fd, _ := open.Ret()
	n, _ := made.Ret()
	s = newScript(r.target.t)
	at := 0
	for i := range views {
		w := &views[i]
		for r.p.VMAs[at].Start != w.Start {
			at++
		}
		v := &r.p.VMAs[at]
		s.on(func() string { return fmt.Sprintf("veil of mapping %v", v.Range) })
		s.call(unix.SYS_MREMAP, uint64(w.Start), w.Bytes(), w.Bytes(), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(w.Shadow))
		if v.Prot != unix.PROT_READ|unix.PROT_WRITE { // what the program has written goes there
			s.call(unix.SYS_MPROTECT, uint64(w.Shadow), w.Bytes(), unix.PROT_READ|unix.PROT_WRITE)
		}
		s.call(unix.SYS_MMAP, uint64(w.Start), w.Bytes(), uint64(v.Prot), mmapFlags(v), fd, uint64(w.Start))
		// Else each fault would bring what lies around it, too.
		s.call(unix.SYS_MADVISE, uint64(w.Start), w.Bytes(), unix.MADV_RANDOM)
		for _, a := range advice {
			if v.Has(a.flag) && (a.flag == "dc" || a.flag == "dd") {
				s.call(unix.SYS_MADVISE, uint64(w.Start), w.Bytes(), a.advice)
			}
		}
		s.part(r.target.pid)
	}
	s.call(unix.SYS_CLOSE, fd)
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	if r.veilFD, err = registerViews(r.pidfd, int(n), views); err != nil {
		return err
	}
	s = newScript(r.target.t)
	s.call(unix.SYS_CLOSE, n)
	if err := s.run(r.target.pid); err != nil {
		return err
	}
	r.views = views
	for i := range r.regions {
		g := &r.regions[i]
		if k, ok := slices.BinarySearchFunc(views, g.Start, func(w View, a page.Addr) int { return cmp.Compare(w.Start, a) }); ok {
			g.Shadow = views[k].Shadow
		}
	}
	return nil
}

// registerViews makes of the userfaultfd that the process has as number fd one of
// ours, with all views.
func registerViews(pidfd, fd int, views []View) (_ *os.File, err error) {
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
	if _, _, err := sys.UffdAPI(n, veilFeatures); err != nil {
		return nil, fmt.Errorf("userfaultfd: features %#x: %w (needs Linux 6.7 and CAP_SYS_PTRACE; --trap uffd does without)", veilFeatures, err)
	}
	for _, w := range views {
		if _, err := sys.UffdRegister(n, uint64(w.Start), w.Bytes(), sys.UffdioRegisterModeWP); err != nil {
			return nil, about(fmt.Errorf("userfaultfd: register: %w", err), "veiled mapping %v", w.Range)
		}
	}
	return f, nil
}

// veilable reports whether memory of v can be shown by a file.
func veilable(v *image.VMA, m *image.Memory) bool {
	if v.Kind != image.VMAAnon || v.Shared || v.Window || v.Prot == unix.PROT_NONE || m.Lazy.BytesIn(v.Range) == 0 || m.Guards.BytesIn(v.Range) > 0 {
		return false
	}
	for _, f := range []string{"gd", "dp", "wf", "lo", "lf", "sl", "ht"} {
		if v.Has(f) {
			return false
		}
	}
	return true
}

// chooseViews says which mappings are to be veiled, and where their shadows go.
func (r *rebuild) chooseViews() ([]View, error) {
	for _, l := range r.p.Rlimits {
		if l.Resource == unix.RLIMIT_AS && l.Cur != unix.RLIM_INFINITY {
			r.cfg.Log.Warn("memory comes by userfaultfd: a limit on addresses (RLIMIT_AS) leaves no room for shadows", "id", r.cfg.ID, "limit", l.Cur)
			return nil, nil
		}
	}
	ms, err := proc.ReadMaps(r.target.pid)
	if err != nil {
		return nil, err
	}
	var taken []page.Range
	for _, m := range ms {
		taken = append(taken, m.Range)
	}
	var vs []*image.VMA
	for i := range r.p.VMAs {
		if v := &r.p.VMAs[i]; veilable(v, r.m) {
			vs = append(vs, v)
		}
	}
	// Each takes two mappings. Where there are very many, the large ones are veiled.
	if room := maxMapCount()*3/4 - len(ms); len(vs) > room {
		slices.SortFunc(vs, func(a, b *image.VMA) int { return cmp.Compare(b.Bytes(), a.Bytes()) })
		vs = vs[:max(room, 0)]
		slices.SortFunc(vs, func(a, b *image.VMA) int { return cmp.Compare(a.Start, b.Start) })
	}
	var all uint64
	for _, v := range vs {
		all += v.Bytes() + 2*congruent
	}
	if all == 0 {
		return nil, nil
	}
	room, ok := hole(all, taken)
	if !ok {
		r.cfg.Log.Warn("memory comes by userfaultfd: no room for shadows", "id", r.cfg.ID, "bytes", all)
		return nil, nil
	}
	views := make([]View, len(vs))
	for i, v := range vs {
		at := room.Start&^(congruent-1) | v.Start&(congruent-1)
		if at < room.Start {
			at += congruent
		}
		views[i] = View{v.Range, at}
		room.Start = at + page.Addr(v.Bytes()) + page.Size // apart, or the kernel joins them
	}
	return views, nil
}

// congruent: a shadow lies like its mapping within what one table of the lowest level
// covers, so that the kernel can move whole tables when it takes that one's place.
const congruent = 2 << 20

// maxMapCount is how many mappings a process may have: proc_sys_vm(5).
func maxMapCount() int {
	const byDefault = 65530
	b, err := os.ReadFile("/proc/sys/vm/max_map_count")
	if err != nil {
		return byDefault
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return byDefault
	}
	return n
}
