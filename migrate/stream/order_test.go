package stream

import (
	"reflect"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// What the process cannot run without waits for nothing else.
func TestOrder(t *testing.T) {
	st, err := pagestore.Create("test-order")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	set := func(first, n int) page.Set {
		at := base + page.Addr(first)*page.Size
		return page.NewSet(page.Range{Start: at, End: at + page.Addr(n)*page.Size})
	}
	for id := range 2 { // 100 lazy pages, 10 of them hot, and 5 eager ones behind
		if _, err := st.AddSource(page.Space(id), set(0, 100), set(200, 5), set(20, 10)); err != nil {
			t.Fatal(err)
		}
	}
	type run struct {
		src  int
		span pagestore.Span
	}
	first := []run{{0, pagestore.Span{First: 100, End: 105}}, {1, pagestore.Span{First: 100, End: 105}},
		{0, pagestore.Span{First: 20, End: 30}}, {1, pagestore.Span{First: 20, End: 30}}}
	rest := []run{{0, pagestore.Span{First: 0, End: 105}}, {1, pagestore.Span{First: 0, End: 105}}}
	for name, c := range map[string]struct {
		order Order
		want  []run
	}{"before the release": {eagerHot, first}, "all": {EagerHotAscending, append(first, rest...)}} {
		var got []run
		for next := c.order(st); ; {
			src, span, ok := next()
			if !ok {
				break
			}
			got = append(got, run{int(src.ID()), span})
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
