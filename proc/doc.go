// Package proc is how a running process is looked at and held: parsers of what
// /proc says of it, the ptrace thread, and readers and writers of its memory.
//
// Tracer owns one locked OS thread: ptrace requests are only accepted from the
// thread that attached, and its end lets every tracee run on. Everything else
// may be called from any goroutine. Addresses and lengths are in bytes.
package proc
