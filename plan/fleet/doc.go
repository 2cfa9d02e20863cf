// Package fleet plans bulk migrations: where each process goes ([Place]), which migrations may run
// beside each other ([Schedule]), how they share a bandwidth ([Share]), and how
// long all of it would take ([Simulation]). It is pure: no clock, no goroutine, no input or output, and
// the same answers to the same questions. Nothing is safe for concurrent use.
// Sizes are in bytes, rates in bytes per second.
//
//	fleet.Validate                     what the operator wrote makes sense
//	placement := Place(fleet)          refused ones are reported
//	s := NewSchedule(fleet, placement.To)
//	for s.Left() > 0 || something runs {
//		for id := range s.Next()   s.Begin(id), and start its migration
//		now and then               limit each by Share
//		one is over                s.End(id, done), perhaps s.Retry(id, to)
//	}
//
// # The model
//
// A host has a link with one rate each way, and ways do not disturb each other. A
// migration takes its bytes by the slower of its two links, and a tenth of a second
// beside. Its bytes are its memory and, once more, what is dirtied meanwhile. The network between
// the hosts is never what is short; where it is, set a budget.
//
// # Where
//
// Each host that takes processes is a machine, each process a job that takes as long
// as its bytes take on that host's link, and the last host to finish ends the whole.
// That is scheduling on parallel machines. Jobs go, the longest first, to the
// machine that has them done first. On equal machines the result is at most 4/3-1/(3m) times
// the best one, with m machines (Graham, Bounds on Multiprocessing Timing Anomalies,
// SIAM J. Appl. Math. 17, 1969), where any order is at most 2-1/m times it. With rates that differ,
// hosts that some may not go to, and little room, that is no proof any more; so moves that
// make room or relieve the last host follow.
//
// # When
//
// [Schedule.Next] is list scheduling, too: whenever something is over, the best of those
// that limits and groups allow begins, and nothing waits that could run. Greed costs
// at most a factor, and needs to know nothing about how long anything will really take. What it
// takes for best, in this order:
//
//  1. What uses idle ends: fewest migrations at the busier one of its two hosts,
//     counted each way, then at both together. A second migration over a busy link
//     adds nothing but dirtied pages, and one over an idle link adds its whole rate.
//  2. The longest first (LPT), by its own time and the longest chain of groups that come after
//     its own. A long migration that begins last runs alone at the end, while all
//     other links idle; a short one fits in anywhere.
//  3. As listed.
//
// Graham's 4/3 holds for one kind of machine, not for pairs of hosts with limits of their own: for
// these the simulation tells, and it does not always say the same. Of 240 processes between 16 hosts, two
// migrations a host and six in all, the other orders took 1.35 to 1.55 times as long; without the six, 0.97 to 1.3 times.
// Of 12 hosts that empty themselves into 4, with two migrations a host, as listed was the best:
// 1.05 times the bound, and longest first 1.14 times. Where the links of the hosts that are evacuated
// are all that counts any order will do, for they never idle.
//
// # How fast
//
// See [Share] for the rule.
//
// # What it does not know
//
// Racks and what lies between them. Memory that processes of a host share, or that
// compresses. That a program's dirty rate changes. Whether what leaves a host makes
// room in time: only what a host can take from the beginning is ever given away.
package fleet
