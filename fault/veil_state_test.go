package fault

import (
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// Who takes over while the program is being stopped is told of the moves of this time,
// and not of one that is over.
func TestMovesOfThisTimeAreSaved(t *testing.T) {
	st, err := pagestore.Create("veil")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	r := page.Range{Start: 1 << 20, End: 1<<20 + 4*page.Size}
	src, err := st.AddSource(0, page.NewSet(r), page.Set{}, page.Set{})
	if err == nil {
		err = src.Veil()
	}
	if err != nil {
		t.Fatal(err)
	}
	saved := VeilState{Moves: []VeiledMove{{PID: 1, From: r.Start, Old: page.Size, Unmap: true}}}
	v, err := NewVeil(VeilConfig{
		Source: src, PID: 1, Views: page.NewSet(r), Saved: saved, Save: func(s VeilState) error { saved = s; return nil },
		Freeze: func() error {
			if !src.Stopping() {
				t.Error("frozen before it was noted")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := v.begin(); err != nil || len(saved.Moves) != 1 {
		t.Errorf("moves that are to be seen to still: %v, %v", saved.Moves, err)
	}
	v.moves = nil // all seen to
	if err := v.begin(); err != nil || len(saved.Moves) != 0 {
		t.Errorf("moves of a time that is over: %v, %v", saved.Moves, err)
	}
}
