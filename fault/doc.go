// Package fault is the userfaultfd trap: it answers the page faults of arriving
// processes, follows their fork, mremap, madvise and munmap, and places pages.
//
// One goroutine, locked to a thread of raised priority, polls all userfaultfds
// (Trap.Run). A fault on a page that the source has is handed to
// Config.Request and forgotten: whoever receives the page calls Trap.Place from
// any goroutine, which wakes the thread. So any number of faults are
// outstanding and are answered in any order. A fault on anything else is
// answered with a zero page at once.
//
// Reading an event lets the program go on before anything was done about it
// (userfaultfd(2)). A page placed after that, by someone who looked it up
// before, would bring old bytes back. So events are read and applied under the
// lock of their pagestore.Space, and pages are looked up and placed under its
// read lock; while an event waits to be read the kernel refuses UFFDIO_COPY with
// EAGAIN, and the placer lets go of the lock and looks again.
//
// Lock order: Trap.mu, then pagestore.Space. Neither is held while waiting for
// anything. Durations are from the reading of a fault to the wake.
package fault
