package plan

import (
	"slices"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func TestBatches(t *testing.T) {
	r := random(t)
	for range 200 {
		var order []page.Set
		var all page.Set
		for range r.IntN(5) {
			s := some(r, r.IntN(6), 300)
			s = page.Difference(&s, &all)
			all = page.Union(&all, &s)
			order = append(order, s.Clone())
		}
		most := uint64(r.IntN(200)) * page.Size
		b := Batches{Order: order, Bytes: most}
		var got page.Set
		class := 0
		for batch, ok := b.Next(); ok; batch, ok = b.Next() {
			if batch.Empty() || batch.Bytes() > max(most, page.Size) {
				t.Fatalf("a batch of %d bytes, at most %d were asked for", batch.Bytes(), most)
			}
			first := batch.Ranges()[0].Start
			for !order[class].Contains(first) {
				class++ // fails beyond the last: batches go back
			}
			if out := page.Difference(&batch, &order[class]); !out.Empty() {
				t.Fatalf("%v of a batch is of another class than its first page", out)
			}
			if twice := page.Intersection(&got, &batch); !twice.Empty() {
				t.Fatalf("%v comes twice", twice)
			}
			got = page.Union(&got, &batch)
		}
		if !slices.Equal(got.Ranges(), all.Ranges()) {
			t.Fatalf("the batches hold %v, not %v", got, all)
		}
	}
}
