package fault

import (
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// savedVeil is a Veil of four pages of process 1, which has nothing mapped, and what it
// saved last.
func savedVeil(t *testing.T, saved *VeilState, cfg VeilConfig) (v *Veil, r page.Range) {
	st, err := pagestore.Create("veil")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	r = page.Range{Start: 1 << 20, End: 1<<20 + 4*page.Size}
	src, err := st.AddSource(0, page.NewSet(r), page.Set{}, page.Set{})
	if err == nil {
		err = src.Veil()
	}
	if err != nil {
		t.Fatal(err)
	}
	cfg.Source, cfg.PID, cfg.Views, cfg.Saved = src, 1, page.NewSet(r), *saved
	cfg.Save = func(s VeilState) error { *saved = s; return nil }
	if v, err = NewVeil(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v, r
}

// Who takes over while the program is being stopped is told of the moves of this time,
// and not of one that is over.
func TestMovesOfThisTimeAreSaved(t *testing.T) {
	saved := VeilState{Moves: []VeiledMove{{PID: 1, From: 1 << 20, Old: page.Size, Unmap: true}}}
	var v *Veil
	v, _ = savedVeil(t, &saved, VeilConfig{Freeze: func() error {
		if !v.src.Stopping() {
			t.Error("frozen before it was noted")
		}
		return nil
	}})
	if err := v.begin(); err != nil || len(saved.Moves) != 1 {
		t.Errorf("moves that are to be seen to still: %v, %v", saved.Moves, err)
	}
	v.moves = nil // all seen to
	if err := v.begin(); err != nil || len(saved.Moves) != 0 {
		t.Errorf("moves of a time that is over: %v, %v", saved.Moves, err)
	}
}

// When the program goes on, all that is known of it has been saved: a pager that takes
// over by what was known before an event would take for old what the program does since.
func TestSavedBeforeTheProgramGoesOn(t *testing.T) {
	saved := VeilState{Moves: []VeiledMove{{PID: 1, From: 1 << 20, Old: page.Size, Size: 2 * page.Size}}}
	var v *Veil
	var r page.Range
	thawed := false
	v, r = savedVeil(t, &saved, VeilConfig{Thaw: func() error {
		thawed = true
		if !v.src.Stopping() {
			t.Error("thawed by nobody's leave: who takes over would not know that it has to")
		}
		if len(saved.Moves) != 0 || len(saved.Processes) != 1 || saved.Processes[0].Own.Bytes() != page.Size {
			t.Errorf("saved before it goes on: %+v", saved)
		}
		return nil
	}})
	v.src.SetStopping(true)
	v.memory.mu.Lock()
	v.of(1).own.Add(page.Range{Start: r.Start, End: r.Start + page.Size}) // as a move of now has shown
	v.memory.changed = true
	v.memory.mu.Unlock()
	if err := v.letGo(); err != nil || !thawed || v.src.Stopping() {
		t.Errorf("letGo: %v, thawed %v, stopping %v", err, thawed, v.src.Stopping())
	}
}

// What is learned while memory is settled is saved at once.
func TestSettledIsSaved(t *testing.T) {
	var saved VeilState
	v, r := savedVeil(t, &saved, VeilConfig{})
	half := page.Range{Start: r.Start, End: r.Start + 2*page.Size}
	v.Settled(1, page.NewSet(half))
	if len(saved.Processes) != 1 || len(saved.Processes[0].At) != 1 || saved.Processes[0].At[0].Start != half.End {
		t.Errorf("settled: %+v", saved)
	}
	v.Again(1, half, half)
	if len(saved.Processes) != 1 || len(saved.Processes[0].At) != 2 {
		t.Errorf("taken back: %+v", saved)
	}
	if v.Expected(1, half, r) != true || v.Expected(1, half, page.Range{Start: r.Start + page.Size, End: r.End}) {
		t.Error("what is expected, and what is not")
	}
	if saved.Processes[0].Own.Bytes() != half.Bytes() {
		t.Errorf("grown over: %+v", saved)
	}
}
