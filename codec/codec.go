package codec

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/pageferry/pageferry/page"
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeros      [page.Size]byte
)

// IsZero reports whether every byte of p is zero. p may have any length.
func IsZero(p []byte) bool {
	// Almost every page with content shows it in its first or last word, and
	// bytes.Equal, which compares 64 bytes at a time, is spared.
	if n := len(p); n >= 16 {
		if binary.LittleEndian.Uint64(p)|binary.LittleEndian.Uint64(p[n-8:]) != 0 {
			return false
		}
	}
	for len(p) > page.Size {
		if !bytes.Equal(p[:page.Size], zeros[:]) {
			return false
		}
		p = p[page.Size:]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// Run looks at the first pages of data, whose length is a whole number of pages
// and not zero, and returns how many of them are alike: all zero, or none.
func Run(data []byte) (zero bool, pages int) {
	zero = IsZero(data[:page.Size])
	for pages = 1; pages*page.Size < len(data); pages++ {
		if IsZero(data[pages*page.Size:(pages+1)*page.Size]) != zero {
			break
		}
	}
	return zero, pages
}

// Sum is the CRC32C of p.
func Sum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// AppendSums appends the CRC32C of each page of data.
func AppendSums(dst []uint32, data []byte) []uint32 {
	for ; len(data) >= page.Size; data = data[page.Size:] {
		dst = append(dst, Sum(data[:page.Size]))
	}
	return dst
}

// SumError says which page of a payload arrived damaged.
type SumError struct {
	Index     int // of the page among those with content
	Got, Want uint32
}

func (e *SumError) Error() string {
	return fmt.Sprintf("codec: page %d of the frame has CRC32C %08x, should have %08x", e.Index, e.Got, e.Want)
}

// Verify checks every page of data against sums, one for each. It returns a
// *SumError for the first that differs: no page of data may be used then.
func Verify(data []byte, sums []uint32) error {
	if len(data) != len(sums)*page.Size {
		return fmt.Errorf("codec: %d checksums for %d bytes", len(sums), len(data))
	}
	return verify(data, sums, 0)
}

// verify is Verify of pages of which the first is page first of the payload.
func verify(data []byte, sums []uint32, first int) error {
	for i, want := range sums {
		if got := Sum(data[i*page.Size : (i+1)*page.Size]); got != want {
			return &SumError{first + i, got, want}
		}
	}
	return nil
}
