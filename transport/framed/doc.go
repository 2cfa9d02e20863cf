// Package framed makes a transport.Lane of any ordered stream of bytes: it puts
// frames on the stream and checks what comes off it. The TCP transport and the
// in-memory fake share it, so the suite that damages the one tests the other.
//
// A Lane has no goroutine: Send works in its caller's, Recv in its own caller's.
// There are no locks either; what both share is atomic. A Lane owns its stream
// from New on.
//
// Receiving, a read-ahead buffer of a few KiB takes the header, the meta and
// whatever small frames follow with one Read, so that a request or the answer
// to a demand fault costs one system call; the rest of a large payload is read
// straight into registered memory. Sending, a batch becomes one gathered write.
package framed
