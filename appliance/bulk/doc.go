// Package bulk moves many processes, as one configuration says: which there are is asked
// of the daemons of its hosts, package plan/fleet decides where each goes and which move at
// one time, and the daemons do the moving.
//
// A run says what is to be true in the end: what a group selects is on one of the hosts
// that the group names. What is there already is let be, so a run that is begun again does
// what is left. What it knows of each process is in a [Store], and is there before a daemon
// is told anything: whoever carries a run on after a kill asks the daemons what became of
// the migrations that were under way, by ids that it had chosen itself.
//
//	           survey                 fleet.Place           fleet.Schedule
//	daemons ─────────────> items ──────────────> waiting ──────────────────> moving ──> done
//	                                                 ^                          │
//	                                                 └────── failed, retries ───┤
//	                                                                            └─────> failed, refused, gone, in-doubt
//
// Goroutines: Run owns one for each migration that it follows, and returns after them. All
// that is known of items is Run's own goroutine's alone; the others tell it.
// The end of a run's context leaves migrations that are under way to the daemons, and the
// next run finds them.
//
// [File] is that configuration; reading it asks nobody and depends on no host.
package bulk
