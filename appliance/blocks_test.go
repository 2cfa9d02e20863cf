package appliance

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
)

// TestBlocks: what is read is right, whatever was read before, and what was read a moment
// ago is not fetched again.
func TestBlocks(t *testing.T) {
	const page = 4096
	content := func(file int, at int64) byte { return byte(int64(file)*31 + at/page*7 + at%page) }
	fetched, broken := 0, errors.New("the link is down")
	var down bool
	b := blocks{fetch: func(_ context.Context, file int, offset int64, buf []byte) error {
		if fetched++; down {
			return broken
		}
		for i := range buf {
			buf[i] = content(file, offset+int64(i))
		}
		return nil
	}}
	read := func(file int, offset int64, n int) {
		t.Helper()
		buf := make([]byte, n)
		if err := b.read(t.Context(), file, offset, buf); err != nil {
			t.Fatal(err)
		}
		for i, c := range buf {
			if c != content(file, offset+int64(i)) {
				t.Fatalf("file %d has %d at %d", file, c, offset+int64(i))
			}
		}
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	for range 200 {
		read(rng.IntN(3), rng.Int64N(30*blockBytes/page)*page, (1+rng.IntN(300))*page)
	}
	if len(b.have) != mostBlocks || len(b.order) != mostBlocks {
		t.Errorf("%d blocks are there, %d in order", len(b.have), len(b.order))
	}
	read(5, 0, 16*blockBytes)
	before := fetched
	read(5, 3*page, 15*blockBytes)
	read(5, 0, page)
	if fetched != before {
		t.Errorf("%d blocks were fetched again", fetched-before)
	}
	down = true
	if err := b.read(t.Context(), 6, 0, make([]byte, page)); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	down = false
	read(6, 0, page)
}
