// Package page holds the words the whole project counts memory in: addresses,
// page numbers, ranges of them, sets of ranges and bitmaps.
//
// It is pure: no system calls, no goroutines, no state. Addresses and lengths
// are in bytes unless a name says pages. A Range is half open. All types are
// plain values; a Set and a Bitmap are not safe for concurrent use except for
// the Bitmap methods whose name begins with Atomic.
package page
