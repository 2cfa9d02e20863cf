package fusemem

import (
	"context"
	"fmt"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/page"
)

// storePiece is how many bytes one notification carries.
const storePiece = 256 << 10

// StoreMem puts the content of pages into the page cache of mem, so that nobody need ask for it. at
// is aligned, data whole pages of which the kernel keeps a copy. Pages of which a READ is under way
// are left out, and so is everything where nobody has opened the file. It can wait until READs are
// answered: see the package comment. After Close it returns ErrClosed.
func (f *FS) StoreMem(at page.Addr, data []byte) error {
	return f.store(nodeMem, uint64(at), data)
}

// StoreFile is StoreMem for map/<i>: page n lies at offset n << page.Shift, the last page may be
// short or not.
func (f *FS) StoreFile(i int, offset uint64, data []byte) error {
	return f.store(nodeMapFile+uint64(i), offset, data)
}

// AwaitFile waits until no READ is under way of length bytes of map/<i> from offset on, but
// for those that begin meanwhile.
func (f *FS) AwaitFile(ctx context.Context, i int, offset, length uint64) error {
	first, last := page.Num(offset>>page.Shift), page.Num((offset+length+page.Size-1)>>page.Shift)
	for f.reads.any(nodeMapFile+uint64(i), first, last) {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.closing:
			return ErrClosed
		case <-time.After(awaitPeriod):
		}
	}
	return nil
}

// awaitPeriod is how often AwaitFile looks.
const awaitPeriod = 200 * time.Microsecond

// StoreImage is StoreMem for map/image. Its content can change: whoever changes it must see to it
// that nothing old is stored after InvalidateImage.
func (f *FS) StoreImage(offset uint64, data []byte) error {
	return f.store(nodeImage, offset, data)
}

func (f *FS) store(node, offset uint64, data []byte) error {
	size := f.layout.size(node)
	if offset%page.Size != 0 || offset > size {
		return fmt.Errorf("fusemem: offset %#x of node %#x cannot be stored to", offset, node)
	}
	if isClosed(f.closing) {
		return ErrClosed
	}
	// The kernel would take what is stored beyond the end for a longer file.
	data = data[:min(uint64(len(data)), size-offset)]
	end := offset + uint64(len(data))
	for at := offset; at < end; {
		first := page.Num(at >> page.Shift)
		last := page.Num((min(end, at+storePiece) + page.Size - 1) >> page.Shift)
		from, to := f.reads.free(node, first, last)
		a, b := uint64(from.Addr()), min(end, uint64(to.Addr()))
		if a < b {
			st := f.server.InodeNotifyStoreCache(node, int64(a), data[a-offset:b-offset])
			if err := f.notified("store", node, st); err != nil {
				return err
			}
		}
		at = max(at+page.Size, uint64(to.Addr()))
	}
	return nil
}

// InvalidateImage makes the kernel forget length bytes of map/image from offset on: after it has
// returned nobody sees what the image gave for them before it was called. It waits for READs under
// way there; reads go on being answered meanwhile.
func (f *FS) InvalidateImage(offset, length uint64) error {
	if length == 0 {
		return nil // to the kernel it would mean all
	}
	return f.notified("invalidate", nodeImage, f.server.InodeNotify(nodeImage, int64(offset), int64(length)))
}

// notified makes an error of what the kernel said to a notification.
func (f *FS) notified(what string, node uint64, st fuse.Status) error {
	switch st {
	case fuse.OK, fuse.ENOENT: // nobody has this inode, so nothing is cached
		return nil
	case fuse.ENODEV, fuse.EBADF:
		return ErrClosed
	}
	if isClosed(f.closing) {
		return ErrClosed
	}
	return fmt.Errorf("fusemem: %s of node %#x: %v", what, node, st)
}
