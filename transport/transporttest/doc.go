// Package transporttest is what every transport is tested with: Run, the suite
// that each implementation of transport.Lane must pass; NewPair, two lanes that
// are connected in memory, for tests of what stands on a lane; and Proxy, a TCP
// proxy that damages, delays and cuts what passes through it, on command or at
// a byte that was set before.
//
// The in-memory pair passes the suite too, so what is proven on it holds for a
// real transport.
package transporttest
