package restore

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// From <linux/mman.h>: the type of a droppable mapping (6.11), and <asm/unistd>.
const (
	mapDroppable = 0x08
	mlockOnFault = 1
	sysMseal     = 462
)

// advice says which madvise brings which flag of VmFlags about.
var advice = []struct {
	flag   string
	advice uint64
}{
	{"sr", unix.MADV_SEQUENTIAL}, {"rr", unix.MADV_RANDOM},
	{"dc", unix.MADV_DONTFORK}, {"dd", unix.MADV_DONTDUMP}, {"wf", unix.MADV_WIPEONFORK},
	{"hg", unix.MADV_HUGEPAGE}, {"nh", unix.MADV_NOHUGEPAGE}, {"mg", unix.MADV_MERGEABLE},
}

// foreign are flags of mappings that cannot be made by mmap.
var foreign = map[string]string{
	"ht": "huge pages of hugetlbfs", "io": "device memory", "pf": "device memory", "ss": "a shadow stack",
}

// checkMappings refuses what cannot be rebuilt.
func checkMappings(p *image.Process) error {
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if kernels(v) {
			continue
		}
		for _, f := range v.Flags {
			if what, bad := foreign[f]; bad {
				return about(fmt.Errorf("%w: %s", ErrUnsupported, what), "mapping %v", v.Range)
			}
		}
	}
	return nil
}

// mmapFlags are those of the mapping but for MAP_ANONYMOUS.
func mmapFlags(v *image.VMA) uint64 {
	fl := uint64(unix.MAP_FIXED_NOREPLACE)
	switch {
	case v.Shared:
		fl |= unix.MAP_SHARED
	case v.Has("dp"):
		fl |= mapDroppable
	default:
		fl |= unix.MAP_PRIVATE
	}
	if v.Has("nr") {
		fl |= unix.MAP_NORESERVE
	}
	if v.Has("gd") {
		fl |= unix.MAP_GROWSDOWN
	}
	return fl
}

// mapAll makes every mapping of the process except those of shared memory
// objects and of the vdso. Files are opened once for all their mappings that
// follow each other.
// Of what was laid the parts that have another protection are changed. This and
// what follows may run in parts.
func mapAll(s *script, tid int, p *image.Process, l *laid, from elsewhere) {
	f := files{s: s}
	for i := range p.VMAs {
		v := &p.VMAs[i]
		s.on(func() string { return fmt.Sprintf("mapping %v %s", v.Range, v.Path) })
		switch v.Kind {
		case image.VMAAnon, image.VMAFile, image.VMAFileShared, image.VMADevice:
		default:
			continue
		}
		at := v.Start
		for _, r := range append(l.kept(v), page.Range{Start: v.End, End: v.End}) {
			if at < r.Start {
				mapOne(s, &f, v, page.Range{Start: at, End: r.Start}, from)
			}
			if !r.Empty() && v.Prot != unix.PROT_READ|unix.PROT_WRITE {
				s.call(unix.SYS_MPROTECT, uint64(r.Start), r.Bytes(), uint64(v.Prot))
			}
			at = r.End
			f.part(tid)
		}
	}
	f.close()
}

// mapOne makes the part r of a mapping of anonymous memory, a file or a device.
func mapOne(s *script, f *files, v *image.VMA, r page.Range, from elsewhere) {
	if v.Kind == image.VMAAnon {
		s.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), uint64(v.Prot), mmapFlags(v)|unix.MAP_ANONYMOUS, minus(1), 0)
		return
	}
	of := uint64(unix.O_RDONLY | unix.O_CLOEXEC)
	if v.Shared && (v.Has("mw") || v.Prot&unix.PROT_WRITE != 0) {
		of = unix.O_RDWR | unix.O_CLOEXEC
	}
	fd := f.open(from.path(v), of)
	s.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), uint64(v.Prot), mmapFlags(v), 0, v.Offset+uint64(r.Start-v.Start)).Arg(4, fd)
}

// dressAll gives all mappings what mmap could not: advice and names.
func dressAll(s *script, tid int, p *image.Process) {
	for i := range p.VMAs {
		if v := &p.VMAs[i]; !kernels(v) {
			dress(s, v)
			s.part(tid)
		}
	}
}

// kernels reports whether v is the kernel's own.
func kernels(v *image.VMA) bool {
	return v.Kind == image.VMAVDSO || v.Kind == image.VMAVVAR || v.Kind == image.VMAVsyscall
}

func dress(s *script, v *image.VMA) {
	start, size := uint64(v.Start), v.Bytes()
	s.on(func() string { return fmt.Sprintf("flags %v of mapping %v %s", v.Flags, v.Range, v.Path) })
	for _, a := range advice {
		if v.Has(a.flag) && !(v.Has("dp") && (a.flag == "wf" || a.flag == "dd")) {
			c := s.call(unix.SYS_MADVISE, start, size, a.advice)
			if a.flag == "mg" || a.flag == "hg" || a.flag == "nh" {
				c.Optional() // hints, of which a kernel may be built without
			}
		}
	}
	if v.Name != "" {
		// A kernel without CONFIG_ANON_VMA_NAME has no names to lose.
		s.call(unix.SYS_PRCTL, unix.PR_SET_VMA, unix.PR_SET_VMA_ANON_NAME, start, size, s.String(v.Name)).Optional()
	}
}

// lockAll locks on fault, for mlock itself would touch every page, before they are
// there. Those that come by userfaultfd are locked as they come. It is the last
// thing to be done to mappings: in one that is locked the kernel makes no guards,
// and gives no page up (madvise(2), EINVAL).
func lockAll(s *script, tid int, p *image.Process) {
	for i := range p.VMAs {
		if v := &p.VMAs[i]; v.Has("lo") && !kernels(v) {
			s.on(func() string { return fmt.Sprintf("lock of mapping %v %s", v.Range, v.Path) })
			s.call(unix.SYS_MLOCK2, uint64(v.Start), v.Bytes(), mlockOnFault)
			s.part(tid)
		}
	}
}

// guardAll makes the guards of m, which lie in anonymous mappings.
func guardAll(s *script, tid int, p *image.Process, m *image.Memory) {
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Kind != image.VMAAnon {
			continue
		}
		gs := m.Guards.Intersect(v.Range)
		if len(gs) == 0 {
			continue
		}
		s.onf("guards in mapping %v", v.Range)
		for _, g := range gs {
			s.call(unix.SYS_MADVISE, uint64(g.Start), g.Bytes(), sys.MadvGuardInstall)
			s.part(tid)
		}
	}
}

// sealAll makes sealed mappings unchangeable; nothing may be changed after it.
func sealAll(s *script, tid int, p *image.Process) {
	for i := range p.VMAs {
		if v := &p.VMAs[i]; v.Has("sl") && !kernels(v) {
			s.onf("seal of mapping %v", v.Range)
			s.call(sysMseal, uint64(v.Start), v.Bytes(), 0)
			s.part(tid)
		}
	}
}
