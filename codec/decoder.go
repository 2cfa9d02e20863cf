package codec

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

// Reader reads pages that are already at the destination.
type Reader interface {
	// ReadPages fills buf, a whole number of pages, from first on. It must not
	// wait for a page that is not there, but fail.
	ReadPages(space page.Space, first page.Num, buf []byte) error
}

// Decoder gives the pages of a frame as they were, one run after the other, each
// verified. It takes hostile input; its memory is wire.MaxBlockPages, taken at the
// first encoded run. Not safe for concurrent use.
//
//	d.Begin(&pages, payload)
//	for _, run := range pages.Runs {
//		content, err := d.Next()
//		... place content as run.Range() before the next call
//	}
type Decoder struct {
	reader  Reader
	scratch []byte

	p       *wire.Pages
	payload []byte
	runs    int // taken up so far, and so on
	sums    int
	lengths int
}

// NewDecoder returns a decoder that reads from r what deltas and references stand
// on. If r is nil, they are refused.
func NewDecoder(r Reader) *Decoder { return &Decoder{reader: r} }

// SetScratch gives the decoder room for what it decodes, at least
// wire.MaxBlockPages; without, it takes some from the heap.
func (d *Decoder) SetScratch(b []byte) { d.scratch = b }

// Begin takes up the frame p with its payload, as wire.ParsePages has found them
// to be in order. Both must stay as they are until the last run was taken.
func (d *Decoder) Begin(p *wire.Pages, payload []byte) {
	d.p, d.payload, d.runs, d.sums, d.lengths = p, payload, 0, 0, 0
}

// Next gives the content of the next run, which is nil for one that brings none,
// as it is at the source: every page has the checksum it should. It is valid
// until the next call. What came before must be placed by then, as a run may
// stand on runs before it.
//
// The error wraps ErrDamaged or is a *SumError where the frame is at fault, and
// the Reader's own where that failed. No more runs may be taken then.
func (d *Decoder) Next() ([]byte, error) {
	run := d.p.Runs[d.runs]
	d.runs++
	if !run.Kind.Content() {
		return nil, nil
	}
	content, err := d.decode(run)
	if err != nil {
		return nil, err
	}
	n := int(run.Count)
	if err := verify(content, d.p.Sums[d.sums:d.sums+n], d.sums); err != nil {
		return nil, err
	}
	d.sums += n
	return content, nil
}

func (d *Decoder) decode(run wire.Run) ([]byte, error) {
	n := int(run.Count) * page.Size
	if run.Kind == wire.RunData {
		content := d.payload[:n:n]
		d.payload = d.payload[n:]
		return content, nil
	}
	length := d.p.Lengths[d.lengths]
	d.lengths++
	enc := d.payload[:length:length]
	d.payload = d.payload[length:]
	if d.scratch == nil {
		d.scratch = make([]byte, wire.MaxBlockPages*page.Size)
	}
	content := d.scratch[:n:n]
	if run.Kind == wire.RunLZ4 {
		return content, Decompress(content, enc)
	}
	first := run.First
	if run.Kind == wire.RunSame {
		first = page.Num(binary.LittleEndian.Uint64(enc))
	}
	// The last page of the address space is left out, as wire does it.
	if last := page.Num(1<<(64-page.Shift) - 1); first > last || first+page.Num(run.Count) > last {
		return nil, damaged("pages that equal those from page %#x, which is beyond the address space", uint64(first))
	}
	if d.reader == nil {
		return nil, damaged("pages encoded as %s, where none are taken", run.Kind)
	}
	if err := d.reader.ReadPages(run.Space, first, content); err != nil {
		return nil, fmt.Errorf("codec: pages encoded as %s stand on page %#x: %w", run.Kind, uint64(first), err)
	}
	if run.Kind == wire.RunDelta {
		return content, ApplyDelta(content, enc)
	}
	return content, nil
}
