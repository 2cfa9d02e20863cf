// Package dirty finds out which pages of a running process change.
//
// A [Tracker] is asked again and again, by Collect: which pages have content of
// the process's own, and which of those may have been written since it was asked
// before. What it says of a page is true of the moment at which it cleared its
// note of it: whoever reads the page after that gets at least what was written
// until then, and what is written later is told the next time. So a page that is
// read while the program writes it is read again, and none is missed.
//
// There are three trackers, of which [Probe] says which this host has:
//
//   - wp-async: a userfaultfd of the process itself write-protects its pages, and
//     the kernel takes the protection away at the first write, without waking
//     anybody (UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN, Linux 6.7). It ends, and
//     all protection with it, when the descriptor is closed: also by the death of
//     the program that holds it.
//   - soft-dirty: the kernel's own bit (Documentation/admin-guide/mm/soft-dirty.rst),
//     where it was built in. It has one user at a time for each process.
//   - hash: pages are read and compared by a hash. It works everywhere and costs
//     a read of all memory each time.
//
// Mappings come and go meanwhile. A mapping that the tracker has not seen before
// is told whole: everything in it is written. Memory that the program gave up is
// in nothing that it tells, and so are pages that read as zero because nobody
// wrote to them: what was sent before and is not content any more is gone.
//
// A Tracker has a lock and may be used by any goroutine; Close waits for a look
// that is going on and is idempotent. It never stops the process; the kernel keeps
// the process from changing its mappings during each piece of a walk.
package dirty
