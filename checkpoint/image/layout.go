package image

import (
	"fmt"

	"github.com/pageferry/pageferry/page"
)

var layoutMagic = [8]byte{'p', 'f', 'l', 'a', 'y', 'o', 'u', 't'}

// Layout is what is to be there of a process before its image comes: the mappings
// that pages can be landed in, and the objects of shared memory that those of the
// kind VMAShared show. What an object is while the process runs may be out of date
// a moment later; what it is for certain says the image.
type Layout struct {
	VMAs     []VMA          `cbor:"1,keyasint"`
	Memories []SharedMemory `cbor:"2,keyasint"` // without content
}

// maxLaidMemories bounds the objects of a layout: each takes a descriptor or a
// mapping of its own.
const maxLaidMemories = 1 << 14

// EncodeLayout is the form in which a layout travels.
func EncodeLayout(l *Layout) ([]byte, error) {
	body, err := encMode.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("image: layout: %w", err)
	}
	return Seal(layoutMagic, body), nil
}

// DecodeLayout reads it. Input may be hostile: the mappings it returns are in
// ascending order, whole pages, and do not overlap; their offsets are whole pages,
// and what they show of an object begins inside of it. No object is there twice.
func DecodeLayout(b []byte) (*Layout, error) {
	body, err := Unseal(layoutMagic, b)
	if err != nil {
		return nil, fmt.Errorf("layout: %w", err)
	}
	var l Layout
	if err := decMode.Unmarshal(body, &l); err != nil {
		return nil, fmt.Errorf("layout: %w: %v", ErrFormat, err)
	}
	if err := l.validate(); err != nil {
		return nil, fmt.Errorf("layout: %w: %w", ErrFormat, err)
	}
	return &l, nil
}

func (l *Layout) validate() error {
	if len(l.Memories) > maxLaidMemories {
		return fmt.Errorf("%d objects of shared memory", len(l.Memories))
	}
	seen := map[ObjectID]bool{}
	for i := range l.Memories {
		m := &l.Memories[i]
		if m.ID == (ObjectID{}) || seen[m.ID] || m.Size <= 0 || len(m.Chunks) > 0 || m.Huge != 0 {
			return fmt.Errorf("shared memory %d of %d bytes", i, m.Size)
		}
		seen[m.ID] = true
	}
	for i := range l.VMAs {
		v := &l.VMAs[i]
		if v.Empty() || !v.Aligned() || i > 0 && v.Start < l.VMAs[i-1].End || v.Offset%page.Size != 0 || v.Offset > 1<<62 {
			return fmt.Errorf("mapping %v at offset %#x", v.Range, v.Offset)
		}
		if v.Window && (v.Kind != VMAShared || v.Offset != 0) {
			return fmt.Errorf("mapping %v of kind %d as a window", v.Range, v.Kind)
		}
		switch v.Kind {
		case VMAAnon, VMAFile:
			if v.Shared {
				return fmt.Errorf("mapping %v is shared", v.Range)
			}
		case VMAShared:
			if v.Memory < 0 || v.Memory >= len(l.Memories) || !v.Shared || v.Offset >= uint64(l.Memories[v.Memory].Size) {
				return fmt.Errorf("mapping %v of shared memory %d at offset %#x", v.Range, v.Memory, v.Offset)
			}
		default:
			return fmt.Errorf("mapping %v of kind %d", v.Range, v.Kind)
		}
	}
	return nil
}
