// Package plan decides, for pre-copy: in which order pages go, when rounds end,
// and what each method of migration would cost. It is pure: it does nothing
// itself, has no goroutine and no clock, and times are passed in. None of its
// types is safe for concurrent use. Sizes are in bytes, rates in bytes per second.
//
// One migration has one [History] and one [Rounds]:
//
//	two or three short looks              history.Note
//	rounds := NewRounds                   with history.Curve of those looks
//	unsent := all of the content
//	for {
//		held := history.HoldBack(unsent, rounds.Takes, rounds.Room, or all of it in hybrid)
//		decision := rounds.Next           unsent without held is dirty
//		Round: send history.Order(unsent without held) in Batches,
//		       each without what was written again meanwhile
//		scan                              history.Note
//		unsent = what the scan found + held
//	}
//
// # The order
//
// Pages go by when the last looks found them written: never first, just now last
// (LRU). A page sent early has much time to be written again and then to be sent
// again; so those go early that are least likely to be. What is written again
// before its turn is skipped and left to the next round (Clark et al., Live
// Migration of Virtual Machines, NSDI 2005, 5.2). What is more likely than not
// to be written again in the time that sending the hottest pages takes is held
// back until the switch, or until that is no longer likely.
//
// The first looks decide how good the order of the first round is, in which most is
// sent twice: three of 300 ms are worth more than three of 50 ms. A long round is worth
// a look in its middle, several in a second: note it, order what is left of the
// round anew, and ask [Rounds.Stop]. What such a look finds written belongs to the
// next round like what the last one finds.
//
// # When a migration switches, and why
//
// After each round the remainder is known: what is dirty, and what is held back.
// The expected downtime is what the state takes and what the remainder takes on
// the wire, at the rate that was measured. There is no number of rounds that is
// too many; the rules are, in this order:
//
//  1. The expected downtime is at most the allowed one: switch.
//  2. Otherwise another round, as long as that makes the remainder smaller. What it
//     would leave is predicted from the working set curve: how much the program has
//     written in intervals of that length ([Curve]). A process that writes
//     2 GiB/s into 10 MiB converges over any link, and one that writes 100 MiB/s
//     all over its memory does not over a link of 1 Gbit/s.
//  3. Hybrid switches to post-copy at once when another round would leave more
//     than three quarters of the remainder, when the last one took less than a
//     tenth off it, or when more than 1.25 times the memory would be sent in all,
//     which can end a round in its middle: post-copy sends each page once. Its downtime is that of the state.
//  4. Pre-copy bears one round that leaves more than nine tenths of the least
//     remainder so far, or has such a round ahead. After the second in a row it
//     slows the program, where allowed: by a fifth, then by a tenth more, and so on
//     up to the limit, each step given as many rounds again. (QEMU's auto-converge
//     has the same two passes and the same steps: cpu-throttle-initial 20,
//     cpu-throttle-increment 10.) Steps that would change nothing according
//     to the curve are passed over. At the limit it gives up, and the process
//     runs on at its source as if nothing had been.
//
// Each [Decision] has a reason with the figures that led to it.
//
// # What it does not know
//
// LRU is wrong for a program that goes through its memory in a circle: the page
// written longest ago is the next one. Skipping makes that bearable, and memory
// near written memory is sent late, but of such a program most is sent twice.
// Where a program writes seldom and everywhere, short looks cannot tell the
// pages apart that it will write next.
package plan
