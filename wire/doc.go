// Package wire is the form of what crosses the network: frames that are
// versioned, little-endian, length-checked and checksummed, and the few fixed
// structures inside them. PROTOCOL.md describes the same.
//
// It is pure: no I/O, no goroutines, no state. Append functions add to a slice
// and return it. Parse functions take hostile input: they are bounded by the
// limits below, never panic, and leave no part of the input unchecked. Those
// that fill slices reuse what the caller hands in, so that a lane in full flow
// allocates nothing. Everything a Parse function refuses wraps ErrMalformed.
//
// Lengths are in bytes, counts in pages or runs as the name says.
package wire
