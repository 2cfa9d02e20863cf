// Package inspect says what a process is made of and whether it can move. It
// never touches the process: no ptrace, no signal, nothing injected. It reads
// /proc and takes short-lived duplicates of descriptors (pidfd_getfd).
//
// A Report lists what was found as Items, each with whether it is carried and,
// where not, why. The judgement of descriptors is that of package fds, so that
// capture refuses what a report refuses. What cannot be seen from outside
// (syscall user dispatch, semaphore undo lists, Landlock) is left to the freeze,
// which refuses it before anything is lost.
//
// The process may run on while it is looked at, so that a report is a sketch
// made over a few milliseconds and not one moment's state. Sizes are in bytes.
// Nothing is kept between calls, and calls may be concurrent.
package inspect
