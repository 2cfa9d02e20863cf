package appliance

import "context"

const (
	blockBytes = 1 << 20
	mostBlocks = 32 // twice what is filled ahead of settling
)

// blocks are parts of files that were read a moment ago. Who settles may have to fill
// again what he has filled, if that took so long that the process has changed, and a
// file may be mapped more than once; without this all of that would cross the link
// again. Not for concurrent use.
type blocks struct {
	fetch func(ctx context.Context, file int, offset int64, buf []byte) error
	have  map[blockID][]byte
	order []blockID // of have, the oldest first
}

type blockID struct {
	file int
	n    int64
}

// read fills buf with what file has from offset on. Both are whole pages.
func (b *blocks) read(ctx context.Context, file int, offset int64, buf []byte) error {
	for len(buf) > 0 {
		id := blockID{file, offset / blockBytes}
		block, ok := b.have[id]
		if !ok {
			if len(b.order) == mostBlocks {
				block = b.have[b.order[0]] // its memory is used again
				delete(b.have, b.order[0])
				b.order = b.order[1:]
			} else {
				block = make([]byte, blockBytes)
			}
			if err := b.fetch(ctx, file, id.n*blockBytes, block); err != nil {
				return err
			}
			if b.have == nil {
				b.have = map[blockID][]byte{}
			}
			b.have[id], b.order = block, append(b.order, id)
		}
		n := copy(buf, block[offset%blockBytes:])
		buf, offset = buf[n:], offset+int64(n)
	}
	return nil
}
