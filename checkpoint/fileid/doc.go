// Package fileid finds what tells whether two files are the same, other than their
// names and times: the GNU build id of an ELF file, and the SHA-256 of any that is not too
// large. Source and destination go by it.
//
// Hash reads the whole file, and remembers in this program what it found: ask before
// a process stands still, and Known while it does. Safe for concurrent use. Sizes are
// in bytes.
package fileid
