package wire

import (
	"encoding/binary"
	"strings"
	"unicode/utf8"

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
)

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
	// MaxDataPages fit into the payload of one frame.
	MaxDataPages = MaxPayload / page.Size
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

// Pages answers a Want, in whole or in part. The payload holds the pages of the
// RunData runs one after the other, and Sums the CRC32C of each of them.
//
//	 0  u64  ID of the Want
//	 8  u32  number of runs
//	12  u32  number of checksums
//	16  runs, then checksums of 4 bytes each
type Pages struct {
	ID   uint64
	Runs []Run
	Sums []uint32
}

// DataPages is how many pages the payload holds.
func (p *Pages) DataPages() (n int) {
	for _, r := range p.Runs {
		if r.Kind == RunData {
			n += int(r.Count)
		}
	}
	return n
}

// AppendPages appends the encoding of p, which must have at least one run, one
// checksum for every data page, and fit into MaxMeta.
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
	return dst
}

// PagesSize is the length of the encoding of a Pages with that many runs and
// checksums.
func PagesSize(runs, sums int) int { return pageHead + runs*runSize + sums*4 }

// ParsePages fills p from b, reusing its slices. payload is the length of the
// frame's payload in bytes, which must be that of the data pages.
func ParsePages(b []byte, payload int, p *Pages) error {
	p.Runs, p.Sums = p.Runs[:0], p.Sums[:0]
	if len(b) < pageHead || len(b) > MaxMeta {
		return malformed("pages of %d bytes", len(b))
	}
	p.ID = binary.LittleEndian.Uint64(b)
	runs := uint64(binary.LittleEndian.Uint32(b[8:]))
	sums := uint64(binary.LittleEndian.Uint32(b[12:]))
	b = b[pageHead:]
	if runs == 0 || runs*runSize+sums*4 != uint64(len(b)) {
		return malformed("pages of %d runs and %d checksums in %d bytes", runs, sums, len(b))
	}
	if sums > MaxDataPages || payload < 0 || sums*page.Size != uint64(payload) {
		return malformed("%d checksums for a payload of %d bytes", sums, payload)
	}
	var data uint64
	for ; runs > 0; runs, b = runs-1, b[runSize:] {
		r, err := parseRun(b)
		if err != nil {
			return err
		}
		switch r.Kind {
		case RunData:
			data += uint64(r.Count)
		case RunZero, RunAbsent:
		default:
			return malformed("answer with pages of kind %d", r.Kind)
		}
		p.Runs = append(p.Runs, r)
	}
	if data != sums {
		return malformed("%d data pages and %d checksums", data, sums)
	}
	for ; len(b) > 0; b = b[4:] {
		p.Sums = append(p.Sums, binary.LittleEndian.Uint32(b))
	}
	return nil
}

// RefuseCode says why pages cannot be had.
type RefuseCode uint16

const (
	RefuseGone  RefuseCode = 1 // the source's copy is lost for good
	RefuseRange RefuseCode = 2 // the request is not within the process's memory
	RefuseRead  RefuseCode = 3 // reading failed; asking again may help
)

func (c RefuseCode) String() string {
	switch c {
	case RefuseGone:
		return "process gone"
	case RefuseRange:
		return "no such memory"
	case RefuseRead:
		return "read failed"
	}
	return "unknown"
}

// Refuse answers a Want whose remaining pages cannot be given.
//
//	 0  u64  ID of the Want
//	 8  u16  Code
//	10  u16  length of the text
//	12  text, UTF-8
type Refuse struct {
	ID   uint64
	Code RefuseCode
	Text string // for people; at most MaxRefuseText bytes
}

const (
	refuseHead = 12
	// MaxRefuseText bounds the text of a Refuse, in bytes.
	MaxRefuseText = 1024
)

// AppendRefuse appends the encoding of r, its text cut to what is allowed.
func AppendRefuse(dst []byte, r Refuse) []byte {
	text := strings.ToValidUTF8(r.Text, "?")
	if len(text) > MaxRefuseText {
		cut := MaxRefuseText
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut]
	}
	dst = binary.LittleEndian.AppendUint64(dst, r.ID)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(r.Code))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// ParseRefuse reads a Refuse from b. An unknown code is the caller's to judge.
func ParseRefuse(b []byte) (Refuse, error) {
	if len(b) < refuseHead {
		return Refuse{}, malformed("refuse of %d bytes", len(b))
	}
	n := int(binary.LittleEndian.Uint16(b[10:]))
	text := b[refuseHead:]
	if n > MaxRefuseText || n != len(text) {
		return Refuse{}, malformed("refuse with a text of %d bytes in %d", n, len(text))
	}
	if !utf8.Valid(text) {
		return Refuse{}, malformed("refuse with a text that is not UTF-8")
	}
	return Refuse{
		ID:   binary.LittleEndian.Uint64(b),
		Code: RefuseCode(binary.LittleEndian.Uint16(b[8:])),
		Text: string(text),
	}, nil
}
