// Package wire is the form of what crosses the network: frames that are
// versioned, little-endian, length-checked and checksummed, and the few fixed
// structures inside them. It is pure: encoders append to a slice, decoders take
// hostile input, are bounded and never panic. PROTOCOL.md describes the same.
package wire
