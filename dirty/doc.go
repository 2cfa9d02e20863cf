// Package dirty finds out which pages of a running process change.
//
// A [Tracker] is asked again and again, by Collect: which pages have content of
// the process's own, and which of those may have been written since it was asked
// before. What it says of a page is true of the moment at which it cleared its
// note of it: whoever reads the page after that gets at least what was written
// until then, and what is written later is told the next time. So a page that is
// read while the program writes it is read again, and none is missed.
//
// There are three methods. [New] takes the best that works and says why not a
// better one; [Probe] says what this host has.
//
//   - wp-async: a userfaultfd of the process itself write-protects its pages, and
//     the kernel takes the protection away at the first write, without waking
//     anybody (UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN, Linux 6.7). It ends, and
//     all protection with it, when the descriptor is closed: also by the death of
//     the program that holds it.
//   - soft-dirty: the kernel's own bit (Documentation/admin-guide/mm/soft-dirty.rst),
//     where it was built in. The process stands still for some milliseconds at
//     each look. It has one user at a time for each process.
//   - hash: pages are read and compared with what was sent. It works everywhere and
//     costs a read of all that was sent each time.
//
// Mappings come and go meanwhile. A mapping that the tracker has not seen before
// is told whole: everything in it is written. Memory that the program gave up is
// in nothing that it tells, and so are pages that read as zero because nobody
// wrote to them: what was sent before and is not content any more is gone.
//
// Shared memory (MAP_SHARED|MAP_ANONYMOUS, memfds) is compared by hash whatever the
// method, page by page of the object: then it does not matter who wrote it, through
// which mapping, descriptor or process. Private mappings of a memfd are like those
// of any file: only the pages that the process has changed are its own. System V
// shared memory, hugetlbfs and shared mappings of files are not told.
//
// Whoever sends pages must say what was sent ([Tracker].Sent): a page that is
// compared is told until it is as it was sent. Until it is sent it is told without
// being read, which says nothing about what the program does.
//
// What a program can notice of wp-async: the first write to each page after a look
// takes about a microsecond longer, and mappings made between two looks do not
// join with their neighbours before the second, those that were written to by then
// not at all: the kernel has given them an anon_vma of their own, since it does not
// share one between mappings that are registered differently (anon_vma_compatible,
// mm/vma.c). A program that makes a mapping beside another and moves both by one
// mremap gets EFAULT as long as they are two. What a device
// writes to pages that were pinned before a look (O_DIRECT, io_uring's buffers) is
// seen by hash only.
//
// A Tracker has a lock and may be used by any goroutine; Close waits for a look
// that is going on and is idempotent. A look of wp-async has a second goroutine where
// there is enough to walk, which ends with it. The kernel keeps the process from changing
// its mappings during each piece of a walk, 128 MiB. A process that calls exec is
// another one: what was tracked is gone, and it is the caller who must notice.
package dirty
