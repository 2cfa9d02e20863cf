package pager

import (
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/pageferry/pageferry/page"
)

// TestLastWords: of the pagers of a migration only the last one counts, and of
// its words the beginning of a crash.
func TestLastWords(t *testing.T) {
	dir := t.TempDir()
	if s := LastWords(dir); s != "" {
		t.Errorf("without a log: %q", s)
	}
	for _, c := range []struct{ said, want string }{
		{"level=WARN msg=\"page lane lost\"\npanic: first\n\ngoroutine 1 [running]:\n", "panic: first"},
		{"", ""},
		{"level=WARN msg=\"page lane lost\"\n", "level=WARN"},
		{"fatal error: second\n\nruntime stack:\n" + strings.Repeat("main.f()\n", 20000), "fatal error: second"},
	} {
		f, err := openLog(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(c.said); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if got := LastWords(dir); !strings.HasPrefix(got, c.want) || len(got) > lastWords || c.want == "" && got != "" {
			t.Errorf("%.60q, want %q", got, c.want)
		}
	}
}

// TestManyRuns: a fragmented process has more runs of pages than the decoder
// takes unless told.
func TestManyRuns(t *testing.T) {
	m := fileMsg{Index: make([]FileRange, 300_000)}
	for i := range m.Index {
		at := page.Num(2 * i).Addr()
		m.Index[i] = FileRange{Range: page.Range{Start: at, End: at + page.Size}, Offset: int64(i) * page.Size}
	}
	b, err := cbor.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode[fileMsg](packet{Op: opFile, Body: b})
	if err != nil || len(got.Index) != len(m.Index) || got.Index[299_999] != m.Index[299_999] {
		t.Errorf("%d runs arrived, %v", len(got.Index), err)
	}
}
