// Package transport is the interface between the migration and the wire, shaped
// like RDMA verbs: registered buffers from a bounded Pool, batches of frames,
// lanes with a purpose of their own, and an optional one-sided read. The TCP
// transport emulates what it lacks.
//
// The source dials every connection. The control lane comes first and is
// authenticated by mutual TLS; over it the destination hands out a one-time key
// to which the urgent and bulk lanes are bound.
//
// A Lane has no goroutine of its own that outlives Close. Pools are bounded, so
// a slow peer slows the reader of the source's memory and nothing piles up.
// Package transporttest has the suite that every implementation must pass.
package transport
