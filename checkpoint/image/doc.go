// Package image is what is known of a process that is not the content of its
// pages: a list of processes, and beside it the objects that they share (open
// files, pipes, shared memory), so that a tree of processes needs no new form.
//
// It is pure data, written by checkpoint's capture and read by its restore, and
// it crosses the wire and lies on disk as CBOR behind a magic, a version, a
// length and a checksum (see Encode). Decoding takes hostile input: it is
// bounded and never panics. What it says is checked by Validate before anybody
// acts on it. Values that the kernel defines (flags, siginfo, user_regs_struct)
// are kept in the kernel's own form for x86-64.
package image
