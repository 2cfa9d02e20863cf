package migrate

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// The sets of a batch on the wire: a version byte, Gone, the number of classes,
// and each of them, as sets of the memory map are written.
const batchVersion = 1

const (
	// maxClasses bounds the classes of a batch.
	maxClasses = 1 << 10
	// maxBatch bounds the pages to be fetched in one: the destination keeps note of
	// each. A source asks for batchBytes.
	maxBatch = 1 << 22
)

func encodeBatch(b *Batch) ([]byte, error) {
	for _, s := range append([]page.Set{b.Gone}, b.Classes...) {
		for _, r := range s.Ranges() {
			if !r.Aligned() || r.Empty() {
				return nil, fmt.Errorf("migrate: batch: %v is not whole pages", r)
			}
		}
	}
	out := page.AppendSet([]byte{batchVersion}, &b.Gone)
	out = binary.AppendUvarint(out, uint64(len(b.Classes)))
	for i := range b.Classes {
		out = page.AppendSet(out, &b.Classes[i])
	}
	return out, nil
}

func decodeBatch(in []byte) (b Batch, err error) {
	if len(in) == 0 || in[0] != batchVersion {
		return b, fmt.Errorf("%w: batch of an unknown version", ErrProtocol)
	}
	if b.Gone, in, err = page.ParseSet(in[1:]); err != nil {
		return b, fmt.Errorf("%w: batch: %w", ErrProtocol, err)
	}
	n, in, err := uvarint(in)
	if err != nil {
		return b, err
	}
	if n > maxClasses {
		return b, fmt.Errorf("%w: batch of %d classes", ErrProtocol, n)
	}
	b.Classes = make([]page.Set, n)
	left := uint64(maxBatch)
	for i := range b.Classes {
		if b.Classes[i], in, err = page.ParseSet(in); err != nil {
			return b, fmt.Errorf("%w: batch: %w", ErrProtocol, err)
		}
		pages := b.Classes[i].Pages()
		if pages > left {
			return b, fmt.Errorf("%w: batch of more than %d pages", ErrProtocol, maxBatch)
		}
		left -= pages
	}
	if len(in) != 0 {
		return b, fmt.Errorf("%w: %d bytes after the batch", ErrProtocol, len(in))
	}
	return b, nil
}
