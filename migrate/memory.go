package migrate

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// The memory map on the wire: a version byte, the number of spaces, and for
// each its number and its sets Lazy, Eager, Hot, Guards and Dirty. A set is the number
// of its ranges, and for each the gap since the end of the one before and its
// length, in pages. All numbers are unsigned varints, so that a range takes two to four
// bytes: a fragmented process has hundreds of thousands of them.
const memoryVersion = 2

const maxSpaces = 1 << 16

func encodeMemory(ms []Memory) ([]byte, error) {
	b := []byte{memoryVersion}
	b = binary.AppendUvarint(b, uint64(len(ms)))
	for i := range ms {
		b = binary.AppendUvarint(b, uint64(ms[i].Space))
		for _, s := range ms[i].sets() {
			for _, r := range s.Ranges() {
				if !r.Aligned() || r.Empty() {
					return nil, fmt.Errorf("migrate: memory map of space %d: %v is not whole pages", ms[i].Space, r)
				}
			}
			b = page.AppendSet(b, s)
		}
	}
	return b, nil
}

func decodeMemory(b []byte) ([]Memory, error) {
	if len(b) == 0 || b[0] != memoryVersion {
		return nil, fmt.Errorf("%w: memory map of an unknown version", ErrProtocol)
	}
	whole := len(b)
	n, b, err := uvarint(b[1:])
	if err != nil {
		return nil, err
	}
	if n > maxSpaces || n > uint64(whole) {
		return nil, fmt.Errorf("%w: memory map of %d spaces", ErrProtocol, n)
	}
	ms := make([]Memory, 0, n)
	for range n {
		var space uint64
		if space, b, err = uvarint(b); err != nil {
			return nil, err
		}
		if space >= maxSpaces {
			return nil, fmt.Errorf("%w: memory map of space %d", ErrProtocol, space)
		}
		m := Memory{Space: page.Space(space)}
		for _, s := range m.sets() {
			if *s, b, err = page.ParseSet(b); err != nil {
				return nil, fmt.Errorf("%w: memory map of space %d: %w", ErrProtocol, space, err)
			}
		}
		ms = append(ms, m)
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%w: %d bytes after the memory map", ErrProtocol, len(b))
	}
	return ms, nil
}

func uvarint(b []byte) (uint64, []byte, error) {
	n, used := binary.Uvarint(b)
	if used <= 0 {
		return 0, nil, fmt.Errorf("%w: memory map cut short", ErrProtocol)
	}
	return n, b[used:], nil
}
