// Package tcp is the transport over TCP: the fallback, and the reference that
// others are compared with.
//
// A Dialer belongs to the source, which opens every connection; a Listener to
// the destination's daemon, on one port for all. A connection begins with a
// preamble of fixed size that says what it is. The Listener finishes the
// handshake of a control connection itself. A page lane it hands out as a raw
// file, its preamble unread, for the pager's process to finish by AcceptLane.
//
//	source                     destination
//	DialControl ── preamble ─> Listener ── TLS ──> Incoming.Control
//	DialLane ───── preamble ─> Listener ─────────> Incoming.Conn ─ SCM_RIGHTS ─> AcceptLane
//
// Control is TLS 1.3 with certificates on both sides, always, but for Insecure.
// Page lanes are the same, and both ends prove besides that they know the
// one-time key that went over control; where both ends allow plain lanes that
// proof is all that guards them.
//
// All lanes are on blocking sockets: a goroutine in Recv is a thread in read(2),
// which the kernel wakes without a detour through the runtime's poller. Close
// wakes it by shutdown(2); the descriptor is closed by the last call to leave.
// The package starts no goroutine but the Listener's.
//
// A link that carries nothing is found within Config.Timeout: by unacknowledged
// data or a window that stays shut (TCP_USER_TIMEOUT) where something is to be
// sent, and by keep-alive probes where not. A peer whose kernel answers while
// its program does nothing is not found here.
package tcp
