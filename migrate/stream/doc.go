// Package stream moves pages over lanes: Server at the source, Fetcher at the
// destination.
//
//	Fetcher                                                    Server
//	  pump     what is missing, in order  ── Want ──────────>   receive
//	                                                            read      ReadPages into a pool buffer, only now
//	                                                            mark      zero pages taken out, a CRC32C for each other
//	  receive  into a pool buffer         <───────── Pages ──   send
//	  verify   every page
//	  place    Placer: UFFDIO_COPY
//
// The destination pulls, so the server has no state: after a broken link the
// fetcher asks for what is missing still. On each lane the server is one
// goroutine and does its stages one after the other; so does the fetcher. Bulk
// lanes overlap each other, and each has a bounded number of bytes asked for and
// not yet here. Demand requests go on the urgent lane, which has nothing else to
// do, whether or not their page is in flight on another.
//
// Fetcher.Read is beside all that: pages into somebody's buffer, of which the store
// knows nothing. Demands go on the urgent lane, what people read on bulk lanes before
// the background stream, within a window of its own.
//
// A page that fails its checksum is never placed: its lane is closed and the
// page asked for again on another.
//
// Ownership: Fetcher.Attach takes the lane. Each lane has one goroutine, which
// ends with it; Fetcher.Close returns after all have. Lock order: a lane's send
// lock, then Fetcher.mu; a read's own is a leaf. Sizes are in bytes unless a name says pages.
package stream
