// Package simulate runs a pre-copy migration on paper: a process of numbered
// pages with a writer, a link with a rate and a round trip, and the real rules of
// package plan, in virtual time and without any memory being moved.
//
// It is for tests and for measuring the rules: a migration of 4 GiB takes a
// fraction of a second, and gives the same figures on every machine. Each page has
// a version, so that a page whose last write would be lost at the switch is found
// ([Result.Lost]).
//
// Sizes are in bytes. It has no goroutine and no clock; all chance comes from a seed.
package simulate
