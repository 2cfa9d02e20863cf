// Package pager is the process that serves one arriving migration, and the
// daemon's handle on it.
//
// The pager ([Main], `pageferry pager`) owns the page lanes, the page store and
// the userfaultfds of the processes that arrive. It never forks a program, and
// never reads, writes or maps memory that it serves: it places pages by
// UFFDIO_COPY and, before the process runs, through /proc/PID/mem.
//
// The keeper is a child of the pager that shares its descriptor table (clone
// with CLONE_FILES) and only pauses. Closing the last copy of a userfaultfd
// makes the kernel hand out zero pages, so the keeper is what lets program and
// content survive a kill of the pager: [Takeover] starts a new pager that takes
// the descriptors from the keeper and the state from the store.
//
// Life of a pager: [Start]; [Client.AttachLane] for each lane;
// [Client.Adopt] for each address space; [Client.Fetch] begins the background
// stream; [Client.WaitEager] before the process may run; [Client.WaitResident];
// [Client.Finish] leaves plain memory behind and ends pager and keeper. After a
// broken link: [Client.NewEpoch] and new lanes. When the daemon has restarted:
// [Connect]; when the pager is dead: [Takeover].
//
// The control connection is a unix SEQPACKET socket that carries CBOR, and
// descriptors as SCM_RIGHTS. Large values travel in a memfd. All methods of a
// [Client] are safe for concurrent use. Sizes are in bytes unless a name says
// pages.
package pager
