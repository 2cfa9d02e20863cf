// Package pace keeps page lanes to a bandwidth: all that share a Limiter,
// together, whatever migrations they belong to.
//
//	Limiter
//	  Wait      bulk frames, one after the other    rate R, burst 20 ms of it
//	  Urgent    answers to demand faults            counted in the same, and let
//	                                                go on until all together are
//	                                                at R and a share on top
//
// In any span of T seconds bulk frames are at most R*T + 0.02*R bytes, and all
// together at most (1+share)*R*T + 0.04*R. What urgent frames take, bulk frames
// make up for by waiting, but for no more than a second's share of it: so faults
// overtake, the mean stays R as long as they ask for less, and a storm of them
// does not stop the stream for longer than it lasts.
//
// Bytes are counted at the moment they may go, not at the one they were promised
// for. Lanes that were kept from their processor all come at once after it, and
// a reservation made before would then let more pass than the burst.
//
// A Limiter has no goroutine and needs no end. Its lock is held for arithmetic
// only.
package pace
