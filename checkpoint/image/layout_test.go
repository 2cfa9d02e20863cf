package image

import (
	"errors"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func aLayout() *Layout {
	at := func(first, end page.Num) page.Range { return page.Range{Start: first.Addr(), End: end.Addr()} }
	return &Layout{
		VMAs: []VMA{
			{Range: at(1, 3), Kind: VMAAnon, Memory: -1, Flags: []string{"nr"}},
			{Range: at(3, 5), Kind: VMAFile, Memory: -1, Path: "/x", Offset: page.Size},
			{Range: at(5, 7), Kind: VMAShared, Shared: true, Memory: 1, Offset: page.Size},
		},
		Memories: []SharedMemory{
			{Size: 1 << 21, ID: ObjectID{1, 2}},
			{Size: 1 << 21, Memfd: true, Name: "y", ID: ObjectID{1, 3}},
		},
	}
}

func TestLayout(t *testing.T) {
	for name, spoil := range map[string]func(l *Layout){
		"":                         func(*Layout) {},
		"overlap":                  func(l *Layout) { l.VMAs[1].Start -= page.Size },
		"empty":                    func(l *Layout) { l.VMAs[1].End = l.VMAs[1].Start },
		"unaligned":                func(l *Layout) { l.VMAs[1].End-- },
		"offset":                   func(l *Layout) { l.VMAs[1].Offset++ },
		"far offset":               func(l *Layout) { l.VMAs[1].Offset = 1 << 63 },
		"behind the object":        func(l *Layout) { l.VMAs[2].Offset = 1 << 21 },
		"no object":                func(l *Layout) { l.VMAs[2].Memory = 2 },
		"object below 0":           func(l *Layout) { l.VMAs[2].Memory = -1 },
		"private view":             func(l *Layout) { l.VMAs[2].Shared = false },
		"shared file":              func(l *Layout) { l.VMAs[1].Shared = true },
		"shared anonymous":         func(l *Layout) { l.VMAs[0].Shared = true },
		"window of a file":         func(l *Layout) { l.VMAs[1].Window = true },
		"window on a part":         func(l *Layout) { l.VMAs[2].Window = true },
		"kind":                     func(l *Layout) { l.VMAs[0].Kind = VMAVDSO },
		"object twice":             func(l *Layout) { l.Memories[1].ID = l.Memories[0].ID },
		"object without a number":  func(l *Layout) { l.Memories[0].ID = ObjectID{} },
		"object of nothing":        func(l *Layout) { l.Memories[0].Size = 0 },
		"object of less":           func(l *Layout) { l.Memories[0].Size = -1 },
		"object with content":      func(l *Layout) { l.Memories[0].Chunks = []Chunk{{Data: []byte{1}}} },
		"object of huge pages":     func(l *Layout) { l.Memories[0].Huge = 21 },
		"objects without an end":   func(l *Layout) { l.Memories = make([]SharedMemory, maxLaidMemories+1) },
		"object that nobody shows": func(l *Layout) { l.VMAs = l.VMAs[:2] },
	} {
		l := aLayout()
		spoil(l)
		b, err := EncodeLayout(l)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeLayout(b)
		switch {
		case name == "" || name == "object that nobody shows":
			if err != nil || len(got.VMAs) != len(l.VMAs) || len(got.Memories) != 2 {
				t.Errorf("%q: %+v, %v", name, got, err)
			}
		case !errors.Is(err, ErrFormat):
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzLayout(f *testing.F) {
	b, _ := EncodeLayout(aLayout())
	f.Add(b[headerBytes:])
	f.Fuzz(func(t *testing.T, body []byte) {
		l, err := DecodeLayout(Seal(layoutMagic, body))
		if err != nil {
			return
		}
		again, err := EncodeLayout(l)
		if err == nil {
			_, err = DecodeLayout(again)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}
