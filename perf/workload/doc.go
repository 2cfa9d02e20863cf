// Package workload is a process that dirties memory at a set rate and checks
// itself: the guinea pig of benchmarks, demonstrations and tests.
//
// Every thread owns a part of the memory. It writes pages of it in the order of
// a [Pattern], a page counting as dirtied once for each write, and verifies all
// of it in a circle: each page holds its number, the sequence number of its last
// write, and data that follows from the seed. The sequence numbers are kept
// beside the memory (four bytes per page), or follow from the pattern, so that a
// page that is lost, stale, misplaced or damaged is found, whatever its content.
//
// The memory lies outside Go's heap, so that the collector does not matter, and
// it is only reached through the owning thread: there are no locks. [Run] blocks
// until its context ends and leaves no goroutine behind.
//
// Two gaps are measured on the process's own monotonic clock. The gap is the
// longest time in which a thread that only sleeps and wakes did not run: the
// downtime that the program itself saw. The stall is the longest time that one
// batch of a writing thread took, page faults included.
//
// Sizes are in bytes, rates in bytes per second, of whole pages.
package workload
