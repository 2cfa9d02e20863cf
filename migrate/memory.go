package migrate

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// The memory map on the wire: a version byte, the number of spaces, and for
// each its number and its sets Lazy, Eager, Hot and Guards. A set is the number
// of its ranges, and for each the gap since the end of the one before and its
// length, in pages. All numbers are unsigned varints, so that a range takes two to four
// bytes: a fragmented process has hundreds of thousands of them.
const memoryVersion = 1

const (
	maxSpaces   = 1 << 16
	maxPageNum  = 1 << (64 - page.Shift) // one past the last page number
	minRangeLen = 2                      // bytes of an encoded range
)

func encodeMemory(ms []Memory) ([]byte, error) {
	b := []byte{memoryVersion}
	b = binary.AppendUvarint(b, uint64(len(ms)))
	for i := range ms {
		b = binary.AppendUvarint(b, uint64(ms[i].Space))
		for _, s := range ms[i].sets() {
			b = binary.AppendUvarint(b, uint64(s.Len()))
			var at page.Num
			for _, r := range s.Ranges() {
				if !r.Aligned() || r.Empty() {
					return nil, fmt.Errorf("migrate: memory map of space %d: %v is not whole pages", ms[i].Space, r)
				}
				b = binary.AppendUvarint(b, uint64(r.Start.Page()-at))
				b = binary.AppendUvarint(b, uint64(r.Pages()))
				at = r.End.Page()
			}
		}
	}
	return b, nil
}

type varints struct {
	b   []byte
	err error
}

func (v *varints) next() uint64 {
	if v.err != nil {
		return 0
	}
	n, used := binary.Uvarint(v.b)
	if used <= 0 {
		v.err = fmt.Errorf("%w: memory map cut short", ErrProtocol)
		return 0
	}
	v.b = v.b[used:]
	return n
}

func decodeMemory(b []byte) ([]Memory, error) {
	if len(b) == 0 || b[0] != memoryVersion {
		return nil, fmt.Errorf("%w: memory map of an unknown version", ErrProtocol)
	}
	v := &varints{b: b[1:]}
	n := v.next()
	if n > maxSpaces || n > uint64(len(b)) {
		return nil, fmt.Errorf("%w: memory map of %d spaces", ErrProtocol, n)
	}
	ms := make([]Memory, 0, n)
	for range n {
		space := v.next()
		if space >= maxSpaces {
			return nil, fmt.Errorf("%w: memory map of space %d", ErrProtocol, space)
		}
		m := Memory{Space: page.Space(space)}
		for _, s := range m.sets() {
			if err := v.set(s); err != nil {
				return nil, err
			}
		}
		ms = append(ms, m)
	}
	if v.err != nil {
		return nil, v.err
	}
	if len(v.b) != 0 {
		return nil, fmt.Errorf("%w: %d bytes after the memory map", ErrProtocol, len(v.b))
	}
	return ms, nil
}

func (v *varints) set(s *page.Set) error {
	count := v.next()
	if count > uint64(len(v.b)/minRangeLen) {
		return fmt.Errorf("%w: memory map announces %d ranges in %d bytes", ErrProtocol, count, len(v.b))
	}
	var at uint64
	for i := range count {
		gap, pages := v.next(), v.next()
		if v.err != nil {
			return v.err
		}
		// The last page of all is left out, so that the end of a range fits.
		if pages == 0 || gap >= maxPageNum || pages >= maxPageNum || at+gap+pages >= maxPageNum || (i > 0 && gap == 0) {
			return fmt.Errorf("%w: memory map: range of %d pages %d after %d", ErrProtocol, pages, gap, at)
		}
		start := at + gap
		at = start + pages
		s.Add(page.Range{Start: page.Num(start).Addr(), End: page.Num(at).Addr()})
	}
	return v.err
}
