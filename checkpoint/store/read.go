package store

import (
	"fmt"
	"hash/crc32"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Verify reads all pages and compares each with its checksum.
func (c *Checkpoint) Verify() error {
	return c.each(nil, func(Extent, []byte) error { return nil })
}

// each calls f with the verified content of every extent that keep takes, in
// pieces of at most pieceBytes.
func (c *Checkpoint) each(keep func(Extent) bool, f func(at Extent, data []byte) error) error {
	buf := make([]byte, pieceBytes)
	for _, ex := range c.Index {
		if keep != nil && !keep(ex) {
			continue
		}
		for off := uint64(0); off < ex.Bytes(); off += pieceBytes {
			n := min(pieceBytes, ex.Bytes()-off)
			if _, err := c.Pages.ReadAt(buf[:n], ex.Offset+int64(off)); err != nil {
				return fmt.Errorf("store: read pages: %w", err)
			}
			at := Extent{ex.Space, page.Range{Start: ex.Start + page.Addr(off), End: ex.Start + page.Addr(off+n)}, ex.Offset + int64(off)}
			if err := c.check(at, buf[:n]); err != nil {
				return err
			}
			if err := f(at, buf[:n]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Checkpoint) check(at Extent, data []byte) error {
	sums := c.Sums[at.Offset/page.Size:]
	for i := 0; i < len(data); i += page.Size {
		if crc32.Checksum(data[i:i+page.Size], castagnoli) != sums[i/page.Size] {
			return fmt.Errorf("%w: page %v in %s is damaged", image.ErrFormat, at.Start+page.Addr(i), pagesFile)
		}
	}
	return nil
}
