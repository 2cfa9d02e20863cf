// Package store keeps a checkpoint in a directory and makes a process of it
// again, without a daemon.
//
// A checkpoint is a directory with three files: image.pgf (checkpoint/image),
// memory.pgf (which pages have content, and the checksum of each) and pages.raw
// (their content, one page after the other in the order of memory.pgf; zero
// pages are holes). It is written beside its final name and renamed when all of
// it is on the disk, so a directory of that name is always whole. It holds the
// process's secrets: 0700, files 0600.
//
// Save stops the process for as long as the copy takes and ends it afterwards
// unless told otherwise; whatever fails before the rename, the process runs on.
package store
