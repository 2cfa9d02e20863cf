// Package migrate is the handover: the state machines of source and destination,
// the messages between them, and what each writes to its journal before it goes
// on. It knows no transport, trap or checkpoint engine: appliance hands them in
// by the interfaces of engine.go and journal.go, and tests drive it on fakes
// alone. The page pipelines are in migrate/stream.
//
// The promise is that a process has exactly one owner, whatever dies, breaks or
// is lost, and that nobody has to guess who it is. It stands on these rules:
//
//   - Until COMMIT is in the source's journal the process is the source's. Any
//     failure before that ends in thaw.
//   - From then on the source never lets its copy run by itself. It asks, for
//     ever, until the destination has said what became of it.
//   - The destination lets its copy run only after COMMIT is in its own journal,
//     and only after it has heard COMMIT. Until it has written that, it may
//     still give its copy up; it journals so first, and a source that hears it
//     takes its own back.
//   - Whoever does not know a migration under the incarnation that took it on
//     has given it up. Under another incarnation nothing is known, and nothing
//     is discarded: that is in doubt, and a person resolves it.
//   - The destination forgets a migration that came to its good end only on the
//     source's DONE, and the source says DONE only once its own journal makes
//     sure that it will never ask again.
//   - What a person resolves is journalled at one side and obeyed by the other.
//
// The states and their edges are in state.go. docs/handover.md tells the whole
// story, failure by failure.
//
// A Source has no goroutine of its own beyond Run, Recover, Settle and the
// resolve methods, of which one is active at a time. A Destination has one for
// each connection that Serve was called for, and one for each arrival that waits
// for its last page. Both hold a turn for each migration rather than a lock:
// it is kept across engine calls and journal writes, and can be waited for with
// a context. Each of them also has a mutex for what is looked at from outside;
// it is never held while a turn is taken or while anything is called. The order
// is turn, then mutex.
//
// Durations are time.Duration inside, milliseconds in Result, microseconds in
// messages; sizes are bytes, or pages where the name says so.
package migrate
