package wire

import (
	"encoding/binary"

	"github.com/pageferry/pageferry/page"
)

// RunKind says what the pages of a run are.
type RunKind uint8

const (
	RunWanted RunKind = 0 // in a Want, and only there
	RunData   RunKind = 1 // content is in the payload
	RunZero   RunKind = 2 // all bytes are zero
	// RunAbsent: the source has nothing there. The page is what a fresh
	// mapping of its kind gives: zeros, or the file's content.
	RunAbsent RunKind = 3
	// RunLZ4: the payload holds the pages as one LZ4 block. At most
	// MaxBlockPages of them.
	RunLZ4 RunKind = 4
	// RunDelta: the payload holds what has changed in this one page against the
	// version of it that the receiver has.
	RunDelta RunKind = 5
	// RunSame: the pages equal others of the same address space that the
	// receiver has. The payload holds the number of the first of those. At most
	// MaxBlockPages.
	RunSame RunKind = 6
)

// Encoded reports whether the payload holds the pages of such a run in another
// form than as they are, so that the frame says how long it is.
func (k RunKind) Encoded() bool { return RunLZ4 <= k && k <= RunSame }

// Content reports whether a run of that kind brings content, which has a
// checksum for every page.
func (k RunKind) Content() bool { return k == RunData || k.Encoded() }

func (k RunKind) String() string {
	switch k {
	case RunWanted:
		return "wanted"
	case RunData:
		return "data"
	case RunZero:
		return "zero"
	case RunAbsent:
		return "absent"
	case RunLZ4:
		return "lz4"
	case RunDelta:
		return "delta"
	case RunSame:
		return "same"
	}
	return "unknown"
}

// Run is Count consecutive pages of one address space that share a Kind.
//
//	0  u32  Space
//	4  u32  Count in bits 0 to 23, Kind in bits 24 to 31
//	8  u64  First
type Run struct {
	Space page.Space
	Kind  RunKind
	Count uint32 // pages, 1 to MaxRunPages
	First page.Num
}

// Range is where the pages of r lie.
func (r Run) Range() page.Range {
	return page.Range{Start: r.First.Addr(), End: (r.First + page.Num(r.Count)).Addr()}
}

const (
	runSize  = 16
	wantHead = 16
	pageHead = 16
	// MaxRunPages bounds a run: 64 GiB in pages of 4 KiB.
	MaxRunPages = 1<<24 - 1
	// MaxRuns fit into the meta of a Want; a Pages frame has less room, its
	// checksums need some.
	MaxRuns = (MaxMeta - wantHead) / runSize
	// MaxDataPages fit into the payload of one frame, and no frame brings more,
	// however they are encoded: what a frame unfolds to is bounded.
	MaxDataPages = MaxPayload / page.Size
	// MaxBlockPages bounds one encoded run, and so what has to be held to
	// decode it.
	MaxBlockPages = 64
	// SameSize is the length in bytes of the payload of a RunSame: the number
	// of the first page that its pages equal.
	SameSize = 8
	// maxNum keeps End of a run's Range from wrapping around.
	maxNum = 1<<(64-page.Shift) - 1
)

func appendRun(dst []byte, r Run) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(r.Space))
	dst = binary.LittleEndian.AppendUint32(dst, r.Count&MaxRunPages|uint32(r.Kind)<<24)
	return binary.LittleEndian.AppendUint64(dst, uint64(r.First))
}

func parseRun(b []byte) (Run, error) {
	w := binary.LittleEndian.Uint32(b[4:])
	r := Run{
		Space: page.Space(binary.LittleEndian.Uint32(b)),
		Kind:  RunKind(w >> 24),
		Count: w & MaxRunPages,
		First: page.Num(binary.LittleEndian.Uint64(b[8:])),
	}
	if r.Count == 0 {
		return r, malformed("run of no pages")
	}
	if r.First > maxNum || uint64(r.First)+uint64(r.Count) > maxNum {
		return r, malformed("run of %d pages from page %#x leaves the address space", r.Count, uint64(r.First))
	}
	return r, nil
}

// Want asks for pages. ID is the asker's own and comes back in the answers,
// which may be several Pages frames, in any order with those of other requests.
//
//	 0  u64  ID
//	 8  u32  number of runs
//	12  u32  zero
//	16  runs, each of kind RunWanted
type Want struct {
	ID   uint64
	Runs []Run
}

// AppendWant appends the encoding of w. It must have 1 to MaxRuns runs; their
// Kind is ignored.
func AppendWant(dst []byte, w Want) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, w.ID)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(w.Runs)))
	dst = binary.LittleEndian.AppendUint32(dst, 0)
	for _, r := range w.Runs {
		r.Kind = RunWanted
		dst = appendRun(dst, r)
	}
	return dst
}

// ParseWant fills w from b, reusing w.Runs.
func ParseWant(b []byte, w *Want) error {
	w.Runs = w.Runs[:0]
	if len(b) < wantHead || len(b) > MaxMeta {
		return malformed("want of %d bytes", len(b))
	}
	w.ID = binary.LittleEndian.Uint64(b)
	n := uint64(binary.LittleEndian.Uint32(b[8:]))
	if z := binary.LittleEndian.Uint32(b[12:]); z != 0 {
		return malformed("reserved field of the want is %#x", z)
	}
	b = b[wantHead:]
	if n == 0 || n*runSize != uint64(len(b)) {
		return malformed("want of %d runs in %d bytes", n, len(b))
	}
	for ; len(b) > 0; b = b[runSize:] {
		r, err := parseRun(b)
		if err != nil {
			return err
		}
		if r.Kind != RunWanted {
			return malformed("want of pages that are %s", r.Kind)
		}
		w.Runs = append(w.Runs, r)
	}
	return nil
}

// Pages answers a Want, in whole or in part. The payload holds what each run
// with content needs, one after the other: the pages of a RunData as they are,
// and the encodings of the others, whose lengths in bytes are in Lengths. Sums
// has the CRC32C of every page with content, as it is when it is decoded.
//
//	 0  u64  ID of the Want
//	 8  u32  number of runs
//	12  u32  number of checksums
//	16  runs, then checksums of 4 bytes each, then a u32 for each encoded run
type Pages struct {
	ID      uint64
	Runs    []Run
	Sums    []uint32
	Lengths []uint32
}

// DataPages is how many pages the payload holds as they are.
func (p *Pages) DataPages() (n int) {
	for _, r := range p.Runs {
		if r.Kind == RunData {
			n += int(r.Count)
		}
	}
	return n
}

// AppendPages appends the encoding of p, which must have at least one run, one
// checksum for every page with content, one length for every encoded run, and
// fit into MaxMeta.
func AppendPages(dst []byte, p Pages) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, p.ID)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(p.Runs)))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(p.Sums)))
	for _, r := range p.Runs {
		dst = appendRun(dst, r)
	}
	for _, s := range p.Sums {
		dst = binary.LittleEndian.AppendUint32(dst, s)
	}
	for _, n := range p.Lengths {
		dst = binary.LittleEndian.AppendUint32(dst, n)
	}
	return dst
}

// PagesSize is the length of the encoding of a Pages with that many runs and
// checksums; each encoded run adds 4 bytes.
func PagesSize(runs, sums int) int { return pageHead + runs*runSize + sums*4 }

// ParsePages fills p from b, reusing its slices. payload is the length of the
// frame's payload in bytes, which must be what the runs need. What is in the
// payload is the decoder's to check.
func ParsePages(b []byte, payload int, p *Pages) error {
	p.Runs, p.Sums, p.Lengths = p.Runs[:0], p.Sums[:0], p.Lengths[:0]
	if len(b) < pageHead || len(b) > MaxMeta {
		return malformed("pages of %d bytes", len(b))
	}
	p.ID = binary.LittleEndian.Uint64(b)
	runs := uint64(binary.LittleEndian.Uint32(b[8:]))
	sums := uint64(binary.LittleEndian.Uint32(b[12:]))
	b = b[pageHead:]
	if runs == 0 || runs*runSize+sums*4 > uint64(len(b)) {
		return malformed("pages of %d runs and %d checksums in %d bytes", runs, sums, len(b))
	}
	if sums > MaxDataPages || payload < 0 || payload > MaxPayload {
		return malformed("%d checksums for a payload of %d bytes", sums, payload)
	}
	var content, data, encoded uint64
	for range runs {
		r, err := parseRun(b)
		if err != nil {
			return err
		}
		switch r.Kind {
		case RunData:
			data += uint64(r.Count)
		case RunZero, RunAbsent:
		case RunLZ4, RunSame, RunDelta:
			if r.Count > MaxBlockPages || r.Kind == RunDelta && r.Count > 1 {
				return malformed("run of %d pages encoded as %s", r.Count, r.Kind)
			}
			encoded++
		default:
			return malformed("answer with pages of kind %d", r.Kind)
		}
		if r.Kind.Content() {
			content += uint64(r.Count)
		}
		p.Runs = append(p.Runs, r)
		b = b[runSize:]
	}
	if content != sums || sums*4+encoded*4 != uint64(len(b)) {
		return malformed("%d pages with content, %d of their runs encoded, with %d checksums in %d bytes", content, encoded, sums, len(b))
	}
	for range sums {
		p.Sums = append(p.Sums, binary.LittleEndian.Uint32(b))
		b = b[4:]
	}
	return p.parseLengths(b, uint64(payload), data)
}

// parseLengths reads the lengths of the encoded runs from b, which has one for
// each, and checks that they and data pages as they are make up payload bytes.
func (p *Pages) parseLengths(b []byte, payload, data uint64) error {
	total := data * page.Size
	if len(b) > 0 {
		for _, r := range p.Runs {
			if !r.Kind.Encoded() {
				continue
			}
			n := binary.LittleEndian.Uint32(b)
			b = b[4:]
			// Only a delta may be empty, if nothing has changed, and what is no
			// shorter than the pages themselves is sent as they are.
			if r.Kind == RunSame && n != SameSize || r.Kind == RunLZ4 && n == 0 || uint64(n) >= uint64(r.Count)*page.Size {
				return malformed("%d pages encoded as %s in %d bytes", r.Count, r.Kind, n)
			}
			total += uint64(n)
			p.Lengths = append(p.Lengths, n)
		}
	}
	if total != payload {
		return malformed("runs that need a payload of %d bytes, with one of %d", total, payload)
	}
	return nil
}
