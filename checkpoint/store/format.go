package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

const (
	imageFile  = "image.pgf"
	memoryFile = "memory.pgf"
	pagesFile  = "pages.raw"
)

var memoryMagic = [8]byte{'P', 'G', 'F', 'Y', 'M', 'E', 'M', '\n'}

// Checkpoint is an opened directory.
type Checkpoint struct {
	Image  *image.Image
	Memory []image.Memory
	// Pages holds the content; Index says where each range of it begins.
	Pages *os.File
	Index []Extent

	// Sums are the CRC32C of each page of Pages, in its order.
	Sums []uint32
}

// Extent is a range of pages that stands in the pages file at Offset (bytes).
type Extent struct {
	Space page.Space
	page.Range
	Offset int64
}

// extents lists the ranges of ms in the order in which they are stored.
func extents(ms []image.Memory) (ex []Extent, bytes int64) {
	for i := range ms {
		for _, set := range []*page.Set{&ms[i].Lazy, &ms[i].Eager} {
			for _, r := range set.Ranges() {
				ex = append(ex, Extent{ms[i].Space, r, bytes})
				bytes += int64(r.Bytes())
			}
		}
	}
	return ex, bytes
}

func encodeMemory(ms []image.Memory, sums []uint32) []byte {
	mem := image.AppendMemory(nil, ms)
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(mem)))
	b = append(b, mem...)
	for _, s := range sums {
		b = binary.LittleEndian.AppendUint32(b, s)
	}
	return image.Seal(memoryMagic, b)
}

func decodeMemory(b []byte) ([]image.Memory, []uint32, error) {
	b, err := image.Unseal(memoryMagic, b)
	if err != nil {
		return nil, nil, err
	}
	if len(b) < 8 || binary.LittleEndian.Uint64(b) > uint64(len(b)-8) {
		return nil, nil, fmt.Errorf("%w: memory map cut short", image.ErrFormat)
	}
	n := binary.LittleEndian.Uint64(b)
	ms, err := image.ParseMemory(b[8 : 8+n])
	if err != nil {
		return nil, nil, err
	}
	rest := b[8+n:]
	_, bytes := extents(ms)
	if bytes < 0 || int64(len(rest)) != bytes/page.Size*4 {
		return nil, nil, fmt.Errorf("%w: %d bytes of checksums for %d bytes of pages", image.ErrFormat, len(rest), bytes)
	}
	sums := make([]uint32, len(rest)/4)
	for i := range sums {
		sums[i] = binary.LittleEndian.Uint32(rest[4*i:])
	}
	return ms, sums, nil
}

// Open reads a checkpoint. The content of the pages is checked when it is read.
func Open(dir string) (*Checkpoint, error) {
	read := func(name string) ([]byte, error) {
		st, err := os.Stat(filepath.Join(dir, name))
		if err == nil && st.Size() > image.MaxBytes {
			err = fmt.Errorf("%w: %s has %d bytes", image.ErrFormat, name, st.Size())
		}
		if err != nil {
			return nil, err
		}
		return os.ReadFile(filepath.Join(dir, name))
	}
	fail := func(err error) (*Checkpoint, error) {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("store: %s is not a checkpoint: %w", dir, err)
		}
		return nil, fmt.Errorf("store: checkpoint %s: %w", dir, err)
	}
	b, err := read(imageFile)
	if err != nil {
		return fail(err)
	}
	img, err := image.Decode(b)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", imageFile, err))
	}
	if b, err = read(memoryFile); err != nil {
		return fail(err)
	}
	ms, sums, err := decodeMemory(b)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", memoryFile, err))
	}
	ex, bytes := extents(ms)
	f, err := os.Open(filepath.Join(dir, pagesFile))
	if err != nil {
		return fail(err)
	}
	if st, err := f.Stat(); err != nil || st.Size() != bytes {
		f.Close()
		return fail(fmt.Errorf("%w: %s has not the %d bytes that the memory map says (%v)", image.ErrFormat, pagesFile, bytes, err))
	}
	return &Checkpoint{Image: img, Memory: ms, Pages: f, Index: ex, Sums: sums}, nil
}

// Close closes the pages file.
func (c *Checkpoint) Close() error { return c.Pages.Close() }
