// Package codec is what is done to the content of pages on their way: finding
// those that are all zero, the CRC32C that each page carries from the read at the
// source to the placement at the destination, and the encodings that save what
// need not cross.
//
// An Encoder makes what was read into the runs and the payload of a frame, a
// Decoder makes pages of it again. In between,
//
//	Twins    knows content that has crossed before, with another page
//	Sent     has pages as they were sent, so that only changes need to be sent
//	LZ4      compresses groups of the others
//	Chooser  decides by measurement whether that pays on this lane
//
// in that order: each is cheaper, and saves more, than the next.
//
// The package is pure: no goroutines and no I/O; the clock is handed in. Functions
// are safe for concurrent use, and so are Sent and Twins, which a migration's
// lanes share. Encoders, Decoders and Choosers belong to one lane each. Nothing
// allocates in full flow. Locks are those of Sent and Twins; none is held while
// another is taken. Content is handed in as whole pages, page.Size bytes each.
package codec
