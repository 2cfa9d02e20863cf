// Package restore makes a process out of an image at the destination.
//
// A Skeleton is the process-to-be. Prepare makes what can be made before the
// source is frozen: a cgroup of its own, and in it a seed, a tiny program that
// only waits, traced and ready to fork the process with the pid that it had.
// While the source's process still runs, Lay makes mappings and objects of shared
// memory that pages can be landed in; Rebuild takes over those that are right still.
// Rebuild turns the seed's child into the process: threads, address space,
// trap, descriptors, signals, timers, credentials, registers. All of it is done
// by system calls that the process makes itself (checkpoint/inject), a few
// batches of many; what can be done from outside is done from outside. Park
// freezes the cgroup and lets go of every thread, so that nothing but a thaw
// lets the process run, whatever dies. Release is that thaw.
//
//	Prepare -> seeded -- Rebuild -> rebuilt -- Park -> parked -- Release -> released
//	             \________________\__________________\-- Abort -> aborted
//
// Up to Park the tracer holds the process with PTRACE_O_EXITKILL: if the daemon
// dies, so does what is half built. From Park on Reattach finds it again by its
// cgroup.
//
// A Skeleton owns its cgroup, the seed, the tracer thread and every descriptor
// that it opened; those in an Adoption pass to the Trap. Methods may be called
// from any goroutine and exclude each other, except that Abort, and the end of
// the context of Rebuild, first kill what is in the cgroup, so that they get
// through whatever the other call waits for. Failure of Rebuild or Park leaves
// nothing behind, as after Abort.
//
// Addresses and lengths are in bytes, page.Range and page.Set are page aligned.
package restore
