package fault

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

func TestParsePunch(t *testing.T) {
	for _, c := range []struct {
		text string
		want page.Range
		ok   bool
	}{
		{"28 0x7f0000001000 0x2000 0x9 0x0 0x0 0x0 0x7ffc 0x7f12\n", page.Range{Start: 0x7f0000001000, End: 0x7f0000003000}, true},
		{"28 0x1000 0x1 0x9 0x0 0x0 0x0 0x7ffc 0x7f12", page.Range{Start: 0x1000, End: 0x2000}, true},
		{"28 0x7f0000001000 0x2000 0x4 0x0 0x0 0x0 0x7ffc 0x7f12", page.Range{}, false}, // MADV_DONTNEED
		{"11 0x7f0000001000 0x2000 0x9 0x0 0x0 0x0 0x7ffc 0x7f12", page.Range{}, false}, // munmap
		{"28 0xffffffffffffffff 0xffffffffffffffff 0x9 0x0", page.Range{}, false},
		{"running\n", page.Range{}, false},
		{"-1 0x7ffc 0x7f12", page.Range{}, false},
		{"", page.Range{}, false},
	} {
		r, ok := parseAdvice(c.text, []uint32{9})
		if ok != c.ok || r != c.want {
			t.Errorf("%q: %v, %v; want %v, %v", c.text, r, ok, c.want, c.ok)
		}
	}
}

func TestLatency(t *testing.T) {
	var l latency
	l.init()
	for range 1000 {
		l.add(time.Millisecond)
	}
	l.add(2 * longest) // more than it counts
	s := l.snapshot()
	if s.Count != 1001 || s.P50 < 900e3 || s.P50 > 1100e3 || s.Max < longest*99/100 {
		t.Errorf("%+v", s)
	}
}
