package restore

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// vdso is a kernel's vdso: the mappings, whose places relative to each other
// the code relies on, and the code.
type vdso struct {
	parts []mapping // ascending
	elf   []byte    // without the slack behind it
}

// span is the range from the first part to the last.
func (v *vdso) span() page.Range {
	return page.Range{Start: v.parts[0].Start, End: v.parts[len(v.parts)-1].End}
}

// code is the mapping of the code itself.
func (v *vdso) code() (mapping, bool) {
	for _, m := range v.parts {
		if m.name == "[vdso]" {
			return m, true
		}
	}
	return mapping{}, false
}

// same reports whether code that was compiled into calls of o can as well call
// into v, moved to o's place.
func (v *vdso) same(o *vdso) bool {
	if len(v.parts) != len(o.parts) || !bytes.Equal(v.elf, o.elf) {
		return false
	}
	for i := range v.parts {
		a, b := v.parts[i], o.parts[i]
		if a.name != b.name || a.Bytes() != b.Bytes() || a.Start-v.parts[0].Start != b.Start-o.parts[0].Start {
			return false
		}
	}
	return true
}

// ownVDSO reads this kernel's, the same in every 64-bit process.
var ownVDSO = sync.OnceValues(func() (*vdso, error) {
	ms, err := proc.ReadMaps(os.Getpid())
	if err != nil {
		return nil, err
	}
	v := vdsoAmong(ms)
	if code, ok := v.code(); ok {
		f, err := os.Open("/proc/self/mem")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b := make([]byte, code.Bytes())
		if _, err := f.ReadAt(b, int64(code.Start)); err != nil {
			return nil, fmt.Errorf("read the vdso: %w", err)
		}
		v.elf = trimELF(b)
	}
	return v, nil
})

// mapping is a part of a vdso.
type mapping struct {
	page.Range
	name string
}

func vdsoAmong(ms []proc.Mapping) *vdso {
	v := &vdso{}
	for _, m := range ms {
		if m.Name == "[vdso]" || strings.HasPrefix(m.Name, "[vvar") {
			v.parts = append(v.parts, mapping{m.Range, m.Name})
		}
	}
	return v
}

// imageVDSO is the source's.
func imageVDSO(p *image.Process) *vdso {
	v := &vdso{elf: trimELF(p.VDSO)}
	for i := range p.VMAs {
		switch m := &p.VMAs[i]; m.Kind {
		case image.VMAVDSO:
			v.parts = append(v.parts, mapping{m.Range, "[vdso]"})
		case image.VMAVVAR:
			name := m.Path
			if name == "" {
				name = "[vvar]"
			}
			v.parts = append(v.parts, mapping{m.Range, name})
		}
	}
	return v
}

// trimELF cuts off what follows the section headers: slack, in which tools that
// inject code leave traces.
func trimELF(b []byte) []byte {
	if len(b) < 64 {
		return b
	}
	le := binary.LittleEndian
	end := le.Uint64(b[40:]) + uint64(le.Uint16(b[58:]))*uint64(le.Uint16(b[60:]))
	if end < 64 || end > uint64(len(b)) {
		return b
	}
	return b[:end]
}

// placeVDSO puts ours where the source's was, in the batch s, or builds a bridge
// where the two differ. cur is where the kernel put ours in the seed; taken is
// everything that is or will be in the address space besides. It returns what
// must be written once the batch has run, nil where nothing.
func placeVDSO(s *script, cur *vdso, p *image.Process, taken []page.Range, force bool) (*patch, error) {
	want := imageVDSO(p)
	if len(want.parts) == 0 {
		for _, m := range cur.parts {
			s.onf("unmap %s", m.name)
			s.call(unix.SYS_MUNMAP, uint64(m.Start), m.Bytes())
		}
		return nil, nil
	}
	if len(cur.parts) == 0 {
		return nil, fmt.Errorf("%w: this kernel gives processes no vdso (vdso=0), and this one has one", ErrUnsupported)
	}
	own, err := ownVDSO()
	if err != nil {
		return nil, err
	}
	cur.elf = own.elf
	if !force && cur.same(want) {
		return nil, moveVDSO(s, cur, want.parts[0].Start, taken)
	}
	if len(p.VDSO) == 0 {
		return nil, fmt.Errorf("%w: the image has no copy of its vdso, and this kernel has another", ErrUnsupported)
	}
	return bridgeVDSO(s, cur, want, p, taken)
}

// moveVDSO moves all parts so that the first is at start.
func moveVDSO(s *script, v *vdso, start page.Addr, taken []page.Range) error {
	from := v.span()
	to := page.Range{Start: start, End: start + page.Addr(from.Bytes())}
	if to == from {
		return nil
	}
	if to.Overlaps(from) {
		// MREMAP_FIXED unmaps what is at the new place, which would be the
		// next part: by way of a spot far from both.
		via, ok := hole(from.Bytes(), append(taken, from, to))
		if !ok {
			return fmt.Errorf("%w: no room to move the vdso", ErrUnsupported)
		}
		v.move(s, via.Start)
	}
	v.move(s, start)
	return nil
}

func (v *vdso) move(s *script, start page.Addr) {
	base := v.parts[0].Start
	for i := range v.parts {
		m := &v.parts[i]
		to := start + (m.Start - base)
		s.onf("move %s to %v", m.name, to)
		s.call(unix.SYS_MREMAP, uint64(m.Start), m.Bytes(), m.Bytes(), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(to))
		m.Range = page.Range{Start: to, End: to + page.Addr(m.Bytes())}
	}
}

// patch is bytes to be written into the process from outside.
type patch struct {
	at    page.Addr
	bytes []byte
}

// bridged are the functions of a vdso that a bridge leads to ours. The others,
// such as getrandom whose state has a layout of its own in every kernel, stay
// the source's code: on data pages full of zeros it makes the system call.
var bridged = map[string]bool{
	"__vdso_clock_gettime": true, "__vdso_gettimeofday": true, "__vdso_time": true,
	"__vdso_getcpu": true, "__vdso_clock_getres": true,
}

// bridgeVDSO keeps our vdso in a hole and puts a copy of the source's at its old
// place, with the functions made to jump into ours. The source's data pages are
// zeros: code of the source's that still runs there, because a signal handler
// interrupted it, finds no usable clock and makes the system call instead.
func bridgeVDSO(s *script, cur, want *vdso, p *image.Process, taken []page.Range) (*patch, error) {
	to, ok := hole(cur.span().Bytes(), append(taken, cur.span()))
	if !ok {
		return nil, fmt.Errorf("%w: no room for this kernel's vdso", ErrUnsupported)
	}
	cur.move(s, to.Start)
	code, ok := cur.code()
	if !ok {
		return nil, fmt.Errorf("%w: this kernel has no vdso", ErrUnsupported)
	}
	ours, err := vdsoSymbols(cur.elf)
	if err != nil {
		return nil, fmt.Errorf("this kernel's vdso: %w", err)
	}
	theirs, err := vdsoSymbols(p.VDSO)
	if err != nil {
		return nil, fmt.Errorf("the image's vdso: %w", err)
	}
	old, ok := want.code()
	if !ok {
		return nil, fmt.Errorf("%w: the image has vdso data and no vdso", ErrUnsupported)
	}
	b := bytes.Clone(p.VDSO)
	entries := map[uint64]bool{}
	for name, at := range theirs {
		target, ok := ours[name]
		if !bridged[name] || !ok {
			continue
		}
		jump := appendJump(nil, uint64(code.Start)+target.Value)
		if at.Size < uint64(len(jump)) || at.Value+at.Size > uint64(len(b)) {
			return nil, fmt.Errorf("%w: %s of the image's vdso has %d bytes", ErrUnsupported, name, at.Size)
		}
		copy(b[at.Value:], jump)
		entries[uint64(old.Start)+at.Value] = true
	}
	for i := range p.Threads {
		t := &p.Threads[i]
		if rip := t.Regs.RIP; old.Contains(page.Addr(rip)) && !entries[rip] {
			return nil, about(ErrInsideVDSO, "thread %d at %#x", t.TID, rip)
		}
	}
	for _, m := range want.parts {
		prot := uint64(unix.PROT_READ)
		if m.name == "[vdso]" {
			prot |= unix.PROT_EXEC
		}
		s.onf("map a stand-in for %s at %v", m.name, m.Range)
		s.call(unix.SYS_MMAP, uint64(m.Start), m.Bytes(), prot,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE, minus(1), 0)
	}
	return &patch{old.Start, b[:min(uint64(len(b)), old.Bytes())]}, nil
}

// vdsoSymbols returns the functions of a vdso by name.
func vdsoSymbols(b []byte) (map[string]elf.Symbol, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	syms, err := f.DynamicSymbols()
	if err != nil {
		return nil, err
	}
	m := map[string]elf.Symbol{}
	for _, s := range syms {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Value != 0 {
			m[s.Name] = s
		}
	}
	return m, nil
}
