// Package checkpoint takes the state of a running process that is not the content
// of its pages, and holds the process while others copy those.
//
// A Session is one process at the source:
//
//	        Isolate        Freeze           Capture          Hold
//	open ──────────> open ────────> stopped ────────> stopped ─────> held
//	  ^               │                │                 │            │
//	  └────────────── Thaw, from everywhere: it runs on unharmed ─────┘
//	                  Kill, from everywhere: its copy has ended
//
// Isolate moves the process into a child of its own cgroup. Freeze stops every
// thread by ptrace. Capture runs system calls inside them (checkpoint/inject) and
// puts all registers back before it returns. Hold freezes the child cgroup and
// detaches: from then on nothing but a thaw lets the process run, whatever dies.
// Signaled says whether a signal has come that the image lacks.
// Register, of a stopped process, lets an RDMA device of ours read its memory.
// Track, Mappings, Windows and Layout are for copying pages while it runs.
// Until Hold the death of this program lets the process run on at once, unharmed.
//
// A Settler is for a process at the destination: it replaces mappings of files of one
// device, those of a FUSE mount, by plain memory, in many short stops, while the
// process runs between them. Whatever this program dies of, each part of a mapping is
// either as it was or replaced. MappedBy finds the processes.
//
// The subpackages: image is the state as data; inject makes system calls inside
// another process; cgroup holds; fds and restore are its descriptors and its way
// back to life; inspect says beforehand what can be carried; store keeps it on
// disk.
//
// A Session owns one ptrace thread, a pidfd, a memory descriptor, and its child
// cgroup. Its methods exclude each other by one lock, except ReadPages, which
// takes none and may be called from any goroutine after Freeze. Addresses and
// lengths are in bytes.
package checkpoint
