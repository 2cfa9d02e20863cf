package fleet

import (
	"cmp"
	"math"
	"slices"
)

// Running is a migration that runs, for [Share].
type Running struct {
	ID        string
	Left      uint64  // bytes that still have to go
	DirtyRate float64 // bytes per second
	Rate      float64 // what it was measured to send, in bytes per second. 0: not known
	PostCopy  bool    // nothing is dirtied any more
}

const (
	// floorPart of the budget goes to all alike: who waits keeps its connections
	// and its measurements.
	floorPart = 0.01
	// converging is how many times its dirty rate a migration needs: then a round leaves
	// three quarters of the one before, with which hybrid goes on (rule 3 of package plan).
	converging = 4.0 / 3
)

// need is from which rate on a migration converges.
func (r *Running) need() float64 {
	if r.PostCopy || !(r.DirtyRate > 0) {
		return 0
	}
	return converging * r.DirtyRate
}

// Share divides a budget, in bytes per second, among migrations that run, and
// returns what each gets, in their order. It is max-min fair but for this: a rate below what
// a process dirties is mostly wasted, for what it sends has to be sent again. A
// migration needs 4/3 of its dirty rate, and nothing where nothing is dirtied. So:
//
//  1. One hundredth of the budget goes to all alike, so that nobody gets nothing.
//  2. After the switch, in post-copy, a program waits for its pages: each such
//     migration gets its plain part, the budget by their number.
//  3. Who converges now, as its measured rate is what it needs or more, gets what it
//     needs, those that need least first. A newcomer does not undo what others have achieved.
//  4. The rest raises all to one level, from below. Somebody who needs more than the
//     level takes no part in that, and keeps waiting at the floor until others are over. When the level reaches
//     what the next one needs, that one gets it at once, those with least left
//     first among equals, before the level goes on rising.
//
// What is left over in rule 4 for the last one that does not get all that it needs, it gets all
// the same: nobody else could have it without losing some of it again with a
// larger budget.
//
// The shares add up to the budget, none is negative, none is 0, and a larger budget gives
// nobody less. A budget of 0 or less gives everybody 0, so ask only where there is one.
func Share(budget float64, rs []Running) []float64 {
	shares := make([]float64, len(rs))
	if !(budget > 0) || len(rs) == 0 {
		return shares
	}
	if math.IsInf(budget, 1) {
		for i := range shares {
			shares[i] = budget
		}
		return shares
	}
	n := float64(len(rs))
	floor := floorPart * budget / n
	rest := budget - floor*n
	plain := rest / n
	order := make([]int, len(rs))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(rs[a].need(), rs[b].need()), cmp.Compare(rs[a].Left, rs[b].Left))
	})
	for i := range rs {
		if rs[i].PostCopy {
			shares[i] = plain
			rest -= plain
		}
	}
	for _, i := range order {
		if r := &rs[i]; !r.PostCopy && r.Rate >= r.need() {
			shares[i] = min(max(0, r.need()-floor), max(0, rest))
			rest -= shares[i]
		}
	}
	raise(rs, order, shares, floor, plain, max(0, rest))
	for i := range shares {
		shares[i] += floor
	}
	return shares
}

// raise is rule 4.
func raise(rs []Running, order []int, shares []float64, floor, plain, rest float64) {
	// joins is the level at which a migration takes part.
	joins := func(i int) float64 {
		if rs[i].PostCopy {
			return plain
		}
		return max(0, rs[i].need()-floor)
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(joins(a), joins(b)) })
	level, in := 0.0, 0
	for ; in < len(order); in++ {
		i := order[in]
		if cost := float64(in) * (joins(i) - level); cost >= rest && in > 0 {
			break
		} else {
			rest -= cost
		}
		level = joins(i)
		lump := level - shares[i]
		if lump > rest {
			shares[i] += rest
			rest = 0
			break
		}
		rest -= lump
	}
	if in > 0 {
		level += rest / float64(in)
	}
	for _, i := range order[:in] {
		shares[i] = level
	}
}
