// Package rdma finds the RDMA device that leads to a peer, makes a soft-RoCE one
// where there is none, and implements transport.Lane and transport.RemoteReader
// over reliable connected queue pairs, two for each lane. Package verbs below it has the only cgo
// of the project.
//
// [Find] reads sysfs and asks the kernel for the route; it needs neither
// libibverbs nor rights. [Open] opens the device it found: one Device for each
// migration, since its protection domain is what bounds who can read what is
// registered. [Connect] makes a Lane beside an authenticated lane that exists
// (a TCP lane), over which both ends tell each other the numbers of their queue
// pairs. That lane stays open as long as the new one: its end is how the death
// of the peer is noticed at once, which a queue pair only tells to who sends.
//
// A Lane carries a stream of bytes in SENDs into receive slots that were posted
// before, so that there is always room: the sender holds a credit for each. The
// stream has headers, metas and small payloads. A large payload stays in the
// sender's pool; the stream has its address and key instead, and the receiver
// fetches it with RDMA READ straight into a buffer of its own pool. Nothing is
// copied on either side. The addresses of what is in flight are in
// wireformat.go.
//
// [Device.Lend] and [Device.Adopt] let peers read the memory of another process, which
// registers it itself: no copy and no work is left for the side that is read.
//
// Goroutines: each Lane has one, which sleeps on the completion channel and ends
// with Close, and one that reads the companion lane; a Device has one for the
// asynchronous events. Lock order: Device.mu before Lane.mu. No lock is held while something
// sleeps but Device.lendMu, while memory of another process is deregistered; posting to
// a queue pair does not sleep.
//
// Nothing on the wire is encrypted, nor are packets authenticated: RoCE v2 has
// neither. Integrity is the ICRC's, a CRC32 over each packet.
package rdma
