package codec

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// A delta is pairs of skip and copy, both unsigned varints, each followed by
// copy bytes: what stays as it was, and what is replaced. PROTOCOL.md has the
// exact rules. It is the form that QEMU calls XBZRLE (docs/devel/migration).

// chunk is how much AppendDelta compares at once. bytes.Equal looks at 64 bytes
// per step, and most of a page that is sent again is as it was.
const chunk = 256

// AppendDelta appends to dst what must change in old to make it new, if that
// takes at most limit bytes, and says whether it does: if not, it returns dst as
// it was. dst need not grow beyond that. old and new have the same length, a multiple of 8 below 2 MiB. Nothing
// is appended for pages that are equal.
func AppendDelta(dst, old, new []byte, limit int) ([]byte, bool) {
	start := len(dst)
	end := start + limit
	last := 0 // the end of what is described
	for i := 0; ; {
		i = differ(old, new, i)
		if i >= len(new) {
			return dst, true
		}
		// A stretch goes on until a whole word is as it was: two pairs for less
		// would be no shorter than what lies between them.
		from := i + bits.TrailingZeros64(word(old, i)^word(new, i))/8
		var x uint64
		// No further than what fits: of a page with other content all through,
		// not all is looked at.
		for stop := min(len(new), i+end-len(dst)+8); i < stop; {
			w := word(old, i) ^ word(new, i)
			if w == 0 {
				break
			}
			x = w
			i += 8
		}
		to := i - bits.LeadingZeros64(x)/8
		if len(dst)+uvarintLen(from-last)+uvarintLen(to-from)+to-from > end {
			return dst[:start], false
		}
		dst = binary.AppendUvarint(dst, uint64(from-last))
		dst = binary.AppendUvarint(dst, uint64(to-from))
		dst = append(dst, new[from:to]...)
		last = to
	}
}

// differ is where the first word at or after i begins that is not the same in
// both, or their length.
func differ(old, new []byte, i int) int {
	for ; i < len(new); i += 8 {
		if i%chunk == 0 {
			for i+chunk <= len(new) && bytes.Equal(old[i:i+chunk], new[i:i+chunk]) {
				i += chunk
			}
			if i >= len(new) {
				break
			}
		}
		if word(old, i) != word(new, i) {
			return i
		}
	}
	return len(new)
}

func word(p []byte, i int) uint64 { return binary.LittleEndian.Uint64(p[i : i+8]) }

// ApplyDelta makes a copy of the old page into the new one. It takes hostile
// input; after an error the content of p has no meaning.
func ApplyDelta(p, delta []byte) error {
	at, size := 0, len(delta)
	for first := true; len(delta) > 0; first = false {
		skip, rest, ok := uvarint(delta)
		if !ok || skip == 0 && !first {
			return damaged("byte %d of the delta: no skip that is allowed there", size-len(delta))
		}
		n, rest, ok := uvarint(rest)
		if !ok || n == 0 {
			return damaged("byte %d of the delta: no length that is allowed there", size-len(rest))
		}
		if n > len(rest) || skip+n > len(p)-at {
			return damaged("byte %d of the delta: %d bytes at %d of a page of %d", size-len(rest), n, at+skip, len(p))
		}
		copy(p[at+skip:], rest[:n])
		at += skip + n
		delta = rest[n:]
	}
	return nil
}

// uvarintLen is how many bytes the varint of n takes, which is below 2 MiB.
func uvarintLen(n int) int {
	switch {
	case n < 1<<7:
		return 1
	case n < 1<<14:
		return 2
	}
	return 3
}

// uvarint takes a varint of at most three bytes, in its shortest form, off b:
// more than the length of a page never needs. binary.Uvarint would take 64 bits
// in up to ten bytes, with as many forms of each number.
func uvarint(b []byte) (n int, rest []byte, ok bool) {
	for i := 0; i < min(len(b), 3); i++ {
		n |= int(b[i]&0x7f) << (7 * i)
		if b[i] < 0x80 {
			return n, b[i+1:], i == 0 || b[i] != 0
		}
	}
	return 0, b, false
}
