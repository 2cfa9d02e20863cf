package page

import (
	"encoding/binary"
	"errors"
)

// ErrSet means that bytes are not an encoded Set.
var ErrSet = errors.New("page: malformed set of ranges")

// AppendSet appends the compact form of a set of page-aligned ranges: their
// number, then for each range the pages since the end of the last one and its
// length in pages, all as unsigned varints.
func AppendSet(b []byte, s *Set) []byte {
	b = binary.AppendUvarint(b, uint64(len(s.r)))
	at := Num(0)
	for _, r := range s.r {
		b = binary.AppendUvarint(b, uint64(r.Start.Page()-at))
		b = binary.AppendUvarint(b, uint64(r.Pages()))
		at = r.End.Page()
	}
	return b
}

// ParseSet reads what AppendSet wrote and returns what follows it. Input may be
// hostile: memory used is at most eight times the input's length.
func ParseSet(b []byte) (Set, []byte, error) {
	n, b, err := uvarint(b)
	if err != nil || n > uint64(len(b))/2 {
		return Set{}, nil, ErrSet
	}
	var s Set
	if n > 0 {
		s.r = make([]Range, 0, n)
	}
	at := uint64(0)
	const most = 1 << (64 - Shift)
	for i := range n {
		var gap, pages uint64
		if gap, b, err = uvarint(b); err != nil {
			return Set{}, nil, err
		}
		if pages, b, err = uvarint(b); err != nil {
			return Set{}, nil, err
		}
		// A gap of nothing would make two ranges that touch.
		if pages == 0 || i > 0 && gap == 0 || gap >= most-at || pages >= most-at-gap {
			return Set{}, nil, ErrSet
		}
		start := Num(at + gap)
		at += gap + pages
		s.r = append(s.r, Range{start.Addr(), Num(at).Addr()})
	}
	return s, b, nil
}

// MarshalBinary is AppendSet, for encoders that look for it. ErrSet where a range
// is not aligned.
func (s Set) MarshalBinary() ([]byte, error) {
	for _, r := range s.r {
		if !r.Aligned() {
			return nil, ErrSet
		}
	}
	return AppendSet(nil, &s), nil
}

// UnmarshalBinary is ParseSet of all of b.
func (s *Set) UnmarshalBinary(b []byte) error {
	got, rest, err := ParseSet(b)
	if err == nil && len(rest) > 0 {
		err = ErrSet
	}
	if err != nil {
		return err
	}
	*s = got
	return nil
}

func uvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, ErrSet
	}
	return v, b[n:], nil
}
