package migrate

import (
	"errors"
	"fmt"
	"slices"
)

// SourceState is where a migration stands at the source.
//
//	running ─> preparing ─> isolated ─> (tracking ─>) frozen ─> held ─> committed ─> serving ─> resident ─> done
//	               │            │          │        │  ╲      │  ╲         │ ╲        ▲
//	               ╰────────────┴──────────┴────────┤   ╲     │   ╲────────┼──╲───────┤ (resolve)
//	                                                ▼    ╲    ▼            ▼   ▼      │
//	                                             aborted <─╲─(the destination says   lost
//	                                                │       ╲   "aborted", or resolve)
//	                                                ╰─> in-doubt ─> committed, serving, resident, aborted, lost
//
// Up to held any failure leads to aborted: the process runs on. From committed
// on the copy at the source never runs again, unless the destination itself has
// durably given its copy up (aborted), or a person resolves it. Only preparing,
// committed, serving, resident, aborted, in-doubt and lost are ever journalled:
// what lies between preparing and committed is undone in the same way.
type SourceState uint8

const (
	SourceRunning   SourceState = iota // nothing was touched
	SourcePreparing                    // journalled; talking to the destination
	SourceIsolated                     // in a child cgroup of its own, still running
	SourceTracking                     // pages are copied while it runs
	SourceFrozen                       // stopped by the tracer: runs on if the daemon dies
	SourceHeld                         // in the frozen cgroup: runs for nobody but Thaw
	SourceCommitted                    // journalled: never runs again at the source
	SourceServing                      // the destination runs it; pages are served
	SourceResident                     // every page is there; the copy is to be killed
	SourceDone                         // the copy is dead
	SourceAborted                      // runs on at the source
	SourceInDoubt                      // held; the destination's journal is another one
	SourceLost                         // held; the destination released its copy and has it no more
	sourceStates
)

var sourceNames = [sourceStates]string{
	"running", "preparing", "isolated", "tracking", "frozen", "held", "committed",
	"serving", "resident", "done", "aborted", "in-doubt", "lost",
}

// sourceEdges is the table of legal transitions.
var sourceEdges = [sourceStates][]SourceState{
	SourceRunning: {SourcePreparing},
	// To held: a restarted daemon finds the process held.
	SourcePreparing: {SourceIsolated, SourceHeld, SourceAborted},
	SourceIsolated:  {SourceTracking, SourceFrozen, SourceAborted},
	SourceTracking:  {SourceFrozen, SourceAborted},
	SourceFrozen:    {SourceHeld, SourceAborted},
	// In doubt: neither COMMIT nor ABORTED could be journalled, and the
	// destination cannot be asked.
	SourceHeld:      {SourceCommitted, SourceAborted, SourceInDoubt},
	SourceCommitted: {SourceServing, SourceResident, SourceAborted, SourceInDoubt, SourceLost},
	SourceServing:   {SourceResident, SourceAborted, SourceInDoubt, SourceLost},
	SourceResident:  {SourceDone},
	SourceDone:      {},
	// In doubt: the destination was resolved to commit after we had aborted.
	SourceAborted: {SourceInDoubt},
	SourceInDoubt: {SourceCommitted, SourceServing, SourceResident, SourceAborted, SourceLost},
	SourceLost:    {SourceAborted, SourceResident},
}

// DestState is where a migration stands at the destination.
//
//	empty ─> prepared ─> ready ─> committed ─> running ─> resident ─> done
//	             │         │          │  ╲        │  ╲        │         ▲
//	             ╰─────────┴──────────┤   ╲───────┼───╲─> lost│─────────╯ (resolve)
//	                                  ▼           ▼     ╲     ▼
//	                               aborted <──────────────────┴ (resolve only, from running on)
//
// Before committed the destination may give its copy up by itself: the source
// has a whole one, and takes it back when it learns of it. All of them but
// empty and done are journalled.
type DestState uint8

const (
	DestEmpty     DestState = iota // knows nothing of it
	DestPrepared                   // skeleton and pager stand, the process does not
	DestReady                      // rebuilt, held by its own frozen cgroup
	DestCommitted                  // journalled: belongs here, about to be released
	DestRunning                    // runs here; pages may still be missing
	DestResident                   // every page is here
	DestDone                       // the source knows it
	DestAborted                    // nothing left
	DestLost                       // was released, and is no more
	destStates
)

var destNames = [destStates]string{
	"empty", "prepared", "ready", "committed", "running", "resident", "done", "aborted", "lost",
}

var destEdges = [destStates][]DestState{
	DestEmpty:    {DestPrepared},
	DestPrepared: {DestReady, DestAborted},
	DestReady:    {DestCommitted, DestAborted},
	// Aborted: COMMIT could not be journalled for certain, nothing was released,
	// and ABORTED could; or resolve.
	DestCommitted: {DestRunning, DestLost, DestAborted},
	DestRunning:   {DestResident, DestLost, DestAborted},
	DestResident:  {DestDone, DestAborted},
	DestDone:      {},
	DestAborted:   {},
	DestLost:      {DestAborted, DestDone},
}

// ErrIllegal is an edge that is not in the table: a defect of this program.
var ErrIllegal = errors.New("migrate: illegal transition")

func (s SourceState) String() string {
	if s < sourceStates {
		return sourceNames[s]
	}
	return fmt.Sprintf("source(%d)", uint8(s))
}

func (s DestState) String() string {
	if s < destStates {
		return destNames[s]
	}
	return fmt.Sprintf("destination(%d)", uint8(s))
}

// To returns next where the edge is legal, else s and ErrIllegal. Staying is
// legal everywhere: repeated messages are.
func (s SourceState) To(next SourceState) (SourceState, error) {
	if s < sourceStates && (next == s || slices.Contains(sourceEdges[s], next)) {
		return next, nil
	}
	return s, fmt.Errorf("%w: source %v -> %v", ErrIllegal, s, next)
}

// To is the same for the destination.
func (s DestState) To(next DestState) (DestState, error) {
	if s < destStates && (next == s || slices.Contains(destEdges[s], next)) {
		return next, nil
	}
	return s, fmt.Errorf("%w: destination %v -> %v", ErrIllegal, s, next)
}

// ParseSourceState is the inverse of String.
func ParseSourceState(name string) (SourceState, error) {
	if i := slices.Index(sourceNames[:], name); i >= 0 {
		return SourceState(i), nil
	}
	return 0, fmt.Errorf("migrate: %q is no state of a source", name)
}

// ParseDestState is the inverse of String.
func ParseDestState(name string) (DestState, error) {
	if i := slices.Index(destNames[:], name); i >= 0 {
		return DestState(i), nil
	}
	return 0, fmt.Errorf("migrate: %q is no state of a destination", name)
}

// Committed reports whether the copy at the source must not run by itself.
func (s SourceState) Committed() bool {
	switch s {
	case SourceCommitted, SourceServing, SourceResident, SourceDone, SourceInDoubt, SourceLost:
		return true
	}
	return false
}

// Final reports whether nothing is left to do but to let the other side know.
func (s SourceState) Final() bool {
	return s == SourceDone || s == SourceAborted
}

// resolvable reports whether a person may decide; otherwise it is decided, and
// Settle brings it to an end by itself.
func (s SourceState) resolvable() bool {
	switch s {
	case SourceCommitted, SourceServing, SourceInDoubt, SourceLost:
		return true
	}
	return false
}
