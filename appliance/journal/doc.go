// Package journal keeps the records of the handover on disk: one directory, the
// store, and in it one file for each migration and role. It implements
// migrate.Journals and migrate.Journal.
//
// A journal's file has all its blocks, written once, before the migration
// touches anything: a header and a ring of slots of one block each. A record
// overwrites a slot in place, synchronously, so that a full disk cannot fail a
// commit. A slot holds its length, its sequence number and a CRC32C: one that
// was torn by a crash is not believed, and the record before it, which is never
// in the slot that is being written, is.
//
// The store has an incarnation, a random number made when the directory is
// new: two stores are never taken for one. It is locked against a second
// daemon. Directory 0700, files 0600.
//
// A Store may be used by any goroutine. A Journal's methods are serialized by
// its own lock, which is held across the write: a record has one place in the
// order.
package journal
