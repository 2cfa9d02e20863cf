package codec

import (
	"errors"
	"fmt"

	"github.com/pierrec/lz4/v4"

	"github.com/pageferry/pageferry/page"
)

// ErrDamaged is wrapped by every error about an encoding that does not decode
// to what it should.
var ErrDamaged = errors.New("codec: damaged encoding")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrDamaged}, args...)...)
}

// LZ4 compresses groups of pages into single LZ4 blocks. Its tables take 48 KiB.
// Not safe for concurrent use.
//
// Of the compressors of pierrec/lz4 it uses the port of the reference's fast
// one: on single pages and groups of 16 that is faster than the library's own
// and makes less of them, as its table is cleared for each block (16 KiB, not
// 136) and it looks at every position.
type LZ4 struct{ c lz4.CompressorCCompat }

// least is how many bytes of n a block must save to be worth its decompression
// and a run of its own: a page of 16, and of a single page an eighth.
func least(n int) int { return max(page.Size/8, n/16) }

// Compress compresses src, which is at least a page, into the beginning of dst,
// which must be as long. It returns the length of the block, or 0 if that does
// not pay. What was written to dst then has no meaning.
func (z *LZ4) Compress(dst, src []byte) int {
	// The compressor gives up when it gets to the end of the room it is given:
	// the shorter that is, the less time is lost on what does not shrink.
	n, err := z.c.CompressBlock(src, dst[:len(src)-least(len(src))])
	if err != nil {
		return 0
	}
	return n
}

// Decompress decodes block into dst, which it must fill to the last byte. It
// takes hostile input, and needs no memory but dst, of which the content has no
// meaning after an error: the decoder of pierrec/lz4 checks each copy against
// the ends of block and dst (internal/lz4block, robustness_test.go).
func Decompress(dst, block []byte) error {
	n, err := lz4.UncompressBlock(block, dst[:len(dst):len(dst)])
	if err != nil {
		return damaged("an LZ4 block of %d bytes for %d: %w", len(block), len(dst), err)
	}
	if n != len(dst) {
		return damaged("an LZ4 block of %d bytes holds %d, should hold %d", len(block), n, len(dst))
	}
	return nil
}
