package page

import (
	"context"
	"fmt"
)

// Size is the size of a page in bytes, and Shift its logarithm. A host with
// another page size is refused by the handshake.
const (
	Size  = 4096
	Shift = 12
)

// Addr is a virtual address, in bytes, in some process.
type Addr uint64

// Num is the number of a page: its address divided by Size.
type Num uint64

// Page returns the number of the page that holds a.
func (a Addr) Page() Num { return Num(a >> Shift) }

// Floor rounds a down to a page boundary, Ceil rounds it up.
func (a Addr) Floor() Addr { return a &^ (Size - 1) }
func (a Addr) Ceil() Addr  { return (a + Size - 1) &^ (Size - 1) }

// Aligned reports whether a lies on a page boundary.
func (a Addr) Aligned() bool { return a&(Size-1) == 0 }

func (a Addr) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// Addr returns the address of the first byte of page n.
func (n Num) Addr() Addr { return Addr(n) << Shift }

// Range is the half-open interval [Start, End) of addresses in bytes.
type Range struct {
	Start Addr `cbor:"1,keyasint" json:"start"`
	End   Addr `cbor:"2,keyasint" json:"end"`
}

// Bytes is the length of r in bytes, Pages in pages.
func (r Range) Bytes() uint64 {
	if r.End <= r.Start {
		return 0
	}
	return uint64(r.End - r.Start)
}

// Pages is the length of r in whole pages; r must be aligned.
func (r Range) Pages() int { return int(r.Bytes() >> Shift) }

// Empty reports whether r holds no address.
func (r Range) Empty() bool { return r.End <= r.Start }

// Aligned reports whether both ends lie on page boundaries.
func (r Range) Aligned() bool { return r.Start.Aligned() && r.End.Aligned() }

// Contains reports whether a lies in r.
func (r Range) Contains(a Addr) bool { return r.Start <= a && a < r.End }

// Covers reports whether every address of o lies in r.
func (r Range) Covers(o Range) bool { return o.Empty() || r.Start <= o.Start && o.End <= r.End }

// Overlaps reports whether r and o share an address.
func (r Range) Overlaps(o Range) bool { return r.Start < o.End && o.Start < r.End }

// Intersect returns the part that r and o share, perhaps empty.
func (r Range) Intersect(o Range) Range {
	x := Range{max(r.Start, o.Start), min(r.End, o.End)}
	if x.Empty() {
		return Range{}
	}
	return x
}

func (r Range) String() string { return fmt.Sprintf("%x-%x", uint64(r.Start), uint64(r.End)) }

// PageOf returns the range of the one page that holds a.
func PageOf(a Addr) Range { return Range{a.Floor(), a.Floor() + Size} }

// Space tells apart the address spaces of one migration: one for each process
// of a tree, in the order of the image. A migration of a single process has
// space 0 only.
type Space uint32

// FirstFileSpace is the first space that is not an address space but a file which
// the process has mapped privately: space FirstFileSpace+i is the i-th entry of
// MappedFiles of the image, and page n lies at offset n*Size of that file. What the
// file lacks, behind its end and in its last page, is zero. No file changes: the
// source keeps open what the process has mapped.
const FirstFileSpace Space = 1 << 16

// Priority orders those who wait for a page.
type Priority uint8

const (
	Background Priority = iota // the stream that moves everything in the end
	Reader                     // a person or tool that reads the image
	Demand                     // a thread of the program stands still for it
)

// Source gives the content of pages of one address space. It is what the FUSE
// read path and the userfaultfd trap stand on.
//
// ReadPages fills buf, whose length is a whole number of pages, with the pages
// from first on, and blocks until it has them, ctx ends, or the source is lost
// for good. Safe for concurrent use.
type Source interface {
	ReadPages(ctx context.Context, first Num, buf []byte, prio Priority) error
}
