package rdma

import (
	"bytes"
	"errors"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

func encodeChunk(c chunk) []byte {
	b := make([]byte, prefixSize, prefixSize+len(c.data)+referenceSize)
	putPrefix(b, c, len(c.data))
	b = append(b, c.data...)
	if c.flags&flagReference != 0 {
		b = appendReference(b, c.ref)
	}
	return b
}

func TestChunk(t *testing.T) {
	for _, c := range []chunk{
		{},
		{credits: 7, pulled: 3},
		{flags: flagGoodbye},
		{flags: flagReference, data: []byte("head"), ref: reference{1 << 60, 2, 3}, credits: 65535},
		{data: []byte("ab"), inline: 2},
	} {
		got, err := parseChunk(encodeChunk(c))
		if err != nil || got.flags != c.flags || got.credits != c.credits || got.pulled != c.pulled || got.inline != c.inline || !bytes.Equal(got.data, c.data) || got.ref != c.ref {
			t.Errorf("%+v became %+v, %v", c, got, err)
		}
	}
	good := encodeChunk(chunk{flags: flagReference, data: []byte("head")})
	for n := range good {
		if _, err := parseChunk(good[:n]); !errors.Is(err, transport.ErrDamaged) {
			t.Errorf("%d of %d bytes: %v", n, len(good), err)
		}
	}
	if _, err := parseChunk(encodeChunk(chunk{data: []byte("a"), inline: 2})); !errors.Is(err, transport.ErrDamaged) {
		t.Errorf("two payloads in a byte: %v", err)
	}
	good[0] |= 4
	if _, err := parseChunk(good); !errors.Is(err, transport.ErrDamaged) {
		t.Errorf("unknown flag: %v", err)
	}
}

// FuzzChunk: whatever comes, a chunk that is taken is the one that was sent.
func FuzzChunk(f *testing.F) {
	f.Add(encodeChunk(chunk{flags: flagReference, data: []byte("head"), ref: reference{1, 2, 3}}))
	f.Add(encodeChunk(chunk{flags: flagGoodbye, credits: 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseChunk(b)
		if err != nil {
			if !errors.Is(err, transport.ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		again := encodeChunk(c)
		if len(again) != len(b) || !bytes.Equal(again[prefixSize:], b[prefixSize:]) {
			t.Errorf("%x is taken for %x", b, again)
		}
	})
}

// FuzzOffer: no bytes of a peer make an offer that is out of bounds.
func FuzzOffer(f *testing.F) {
	id := transport.LaneID{Migration: transport.MigrationID{1}, Epoch: 2, Kind: transport.Urgent, Index: 3}
	good := offer{Magic: offerMagic, Version: offerVersion, Kind: uint8(id.Kind), Index: id.Index, Migration: id.Migration, Epoch: id.Epoch,
		MTU: 1024, SlotSize: slotSize, Credits: dataSlots, Refs: maxRefs}
	if o, err := parseOffer(good.encode(""), id); err != nil || o != good {
		f.Fatalf("%+v, %v", o, err)
	}
	f.Add(good.encode(""))
	good.Refused = 1
	f.Add(good.encode("no memory"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := parseOffer(b, id)
		if err == nil && (o.Credits == 0 || o.Refs == 0 || o.SlotSize < prefixSize+referenceSize || o.Migration != id.Migration || o.QPN >= 1<<24) {
			t.Errorf("%+v was taken", o)
		}
	})
}

// FuzzOffered: what is taken for an offer of memory is the one that was made.
func FuzzOffered(f *testing.F) {
	f.Add(appendOffered(nil, []transport.Remote{{Space: 1, Range: page.Range{Start: 4096, End: 8192}, Key: 7}}, true))
	f.Add(appendOffered(nil, nil, false))
	f.Fuzz(func(t *testing.T, b []byte) {
		rs, more, err := parseOffered(nil, b)
		if err != nil {
			if !errors.Is(err, transport.ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		if again := appendOffered(nil, rs, more); !bytes.Equal(again, b) {
			t.Errorf("%x is taken for %x", b, again)
		}
	})
}
