// Package pagestore knows which pages of an arriving migration are here. It
// keeps no content: pages go straight to their place in the process. What it
// knows lies in a memfd, so that a new pager can go on where a killed one was.
//
// A Source is an address space at the source: its pages with content, numbered
// by an Index. A Space is an address space here that needs them: the arriving
// process, and each child that it forks before it has all its pages. Every page
// of a space is missing, until it is settled: placed, known to be zero, or
// given up by the program. Settled pages never become missing again, and a
// settled page that is touched and not there is zero.
//
// Where the pages of a source belong in a space changes when the program calls
// mremap, and with fork: see Change. Events of a userfaultfd are read into
// the space's log (Space.LogTail), which is part of the memfd, and then applied
// together; that is repeated without harm after a kill at any point.
//
// Lock order: Space.mu, which the trap holds across reading and applying events
// (Lock) and across looking up and placing (RLock), before Store.mu; a parent's
// before its child's. Bits are
// cleared under RLock, so a clear bit never becomes set.
//
// Addresses and lengths are in bytes, an index counts pages.
package pagestore
