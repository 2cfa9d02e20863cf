package fault

import (
	"slices"

	"github.com/pageferry/pageferry/page"
)

// VeilState is what a Veil knows of the programs that nothing else tells: whoever takes
// its place must have it.
type VeilState struct {
	Processes []VeiledProcess
	Moves     []VeiledMove // that were under way when an event was read
}

// VeiledProcess is what is known of one process: At[i] shows Src[i], but at Own the file
// does not count.
type VeiledProcess struct {
	PID     int
	At, Src []page.Range
	Own     page.Set
}

// VeiledMove is a mremap of Old bytes at From, which are Size afterwards, or a munmap.
type VeiledMove struct {
	PID             int
	From, Old, Size page.Addr
	Stays, Unmap    bool
}

// restore takes up what was saved.
func (v *Veil) restore(st VeilState) {
	for _, p := range st.Processes {
		s := &seen{own: p.Own}
		for i := range p.At {
			s.sights = append(s.sights, sight{p.At[i], p.Src[i]})
		}
		v.memory.by[p.PID] = s
	}
	v.memory.moves = st.Moves
	for _, m := range st.Moves {
		v.moves = append(v.moves, mover{m.PID, move{m.From, m.Old, m.Size, m.Stays, m.Unmap}})
	}
}

// save is to be called when all that is known has been acted upon: before an event is
// read, as what it tells cannot be asked for again then, and before the program goes on,
// as it may change anything then.
func (v *Veil) save() error {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	moves := make([]VeiledMove, len(v.moves))
	for i, m := range v.moves {
		moves[i] = VeiledMove{m.pid, m.from, m.old, m.size, m.stays, m.unmap}
	}
	if !slices.Equal(moves, v.memory.moves) {
		v.memory.moves, v.memory.changed = moves, true
	}
	return v.keepState()
}

// keepState saves what has changed; mu is held. The moves are those of the last save: they
// are Run's alone.
func (v *Veil) keepState() error {
	if !v.memory.changed {
		return nil
	}
	st := VeilState{Moves: v.memory.moves}
	for pid, s := range v.memory.by {
		p := VeiledProcess{PID: pid, Own: s.own}
		for _, g := range s.sights {
			p.At, p.Src = append(p.At, g.at), append(p.Src, g.src)
		}
		st.Processes = append(st.Processes, p)
	}
	if err := v.cfg.Save(st); err != nil {
		return err
	}
	v.memory.changed = false
	return nil
}

// forget drops what is known of processes that are not there any more, and takes up new
// ones: they see what their parent saw, before what it has done since is looked at.
func (v *Veil) forget(pids []int) {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	for pid := range v.memory.by {
		if !slices.Contains(pids, pid) {
			delete(v.memory.by, pid)
			v.memory.changed = true
		}
	}
	for _, pid := range pids {
		v.of(pid)
	}
}
