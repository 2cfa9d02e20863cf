// Package fusemem shows the memory of a process at its source as a FUSE file system, over
// page.Source values. It knows nothing of lanes or stores.
//
//	mem                 the address space, offset = virtual address, as /proc/PID/mem would be
//	maps                its mappings, as /proc/PID/maps would be
//	vma/<start>-<end>   one file for each mapping, from its first byte on
//	files/<path>        the files that the process has mapped
//	status              JSON
//	resident            a bitmap of what is here already
//	map/<i>, map/image  the same files, and the image, for the process itself to map
//
// Everything is read-only and root's. What lies below map has inodes, and so a page cache, of its
// own: reads there are page.Demand, all others page.Reader, so nobody who looks at a file can hold
// up the process. The bytes of a page never change, except those of map/image, whose owner
// invalidates what it changes (InvalidateImage).
//
// A read of mem behaves as one of /proc/PID/mem: what is mapped up to the first unmapped page, then
// EIO. The kernel reads ahead in large requests. One that touches an unmapped page is refused as a
// whole, for a short reply would tell the kernel that the file ends there (fs/fuse/file.c,
// fuse_short_read); the kernel then asks for each page by itself, when somebody wants it. So the
// last MiB before a gap comes page by page from mem, and in large pieces from vma.
//
// A page fault reads as far around its page as the kernel reads ahead, a MiB, in one READ that is
// answered as a whole. That is too much where pages are far away and a program waits: let it open
// its files while the read-ahead is small (SetReadAhead), or set MADV_RANDOM on what it maps, and
// bring neighbours by StoreFile and StoreImage.
//
// # Processes
//
// The process that calls Run must not read, map or stat anything below Dir, nor fork: the runtime
// would wait for a thread that waits for the runtime. Restored processes and people's tools are the
// readers.
//
// # Signals
//
// The kernel reports every signal that arrives at a waiting reader, and would turn an EINTR into a
// SIGBUS where the reader is a page fault: a SIGCHLD, a ptrace stop or the cgroup freezer would
// kill the program. So only a reader that is being killed (SIGKILL is pending) is let go at once.
// People's readers are let go two seconds after any signal, the process itself never. Until its
// page is here it can neither be frozen nor stopped: the kernel waits for it.
//
// # Another pager
//
// The mount lives as long as anybody holds its device descriptor. Node ids follow from the order of
// the configuration, and no request stands on an earlier one, so a new process with an equal Config
// can go on where a killed one stopped: Takeover. The source of the mount (mountinfo) carries a
// digest of the configuration, and another one is refused.
//
// # Goroutines and locks
//
// go-fuse runs one goroutine for each request. The table of READs under way has a lock, which is
// held for no I/O. A READ whose Source waits has one more goroutine, which ends with it. StoreMem
// and its like, and InvalidateImage, may wait until a READ is answered: call them where no page's
// arrival depends on their return.
package fusemem
