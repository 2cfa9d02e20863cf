// Package fds captures the descriptor table of a frozen process and makes it
// anew in another one, and says beforehand what of it cannot be carried.
//
// # Capture
//
// Examine describes every open file by /proc/PID/fd and fdinfo and by duplicates
// of the descriptors (pidfd_getfd), which show what no file of /proc does: socket
// options, unread data, seals. Descriptors share an open file where kcmp says
// so; only those of one inode are compared. Unread data stays where it is: pipes
// are copied by tee(2), queues by MSG_PEEK. The one thing that is changed for a
// moment is the peek offset of unix sockets with message boundaries, which is put
// back. Capture is Examine with content; it refuses what Examine says is not
// carried, with the same words.
//
// # Restore
//
// Most objects are made in this process, by plain calls, and handed to the
// target over a socket pair (SCM_RIGHTS): that costs two injected batches for
// any number of descriptors, and the code that makes a socket is ordinary code.
// Made or done inside the target is only what depends on who does it:
//
//   - epoll registrations, whose key has the number of a descriptor, also those
//     under a number that meanwhile names another file or none
//   - unix socket pairs and listen(2) on unix sockets, because SO_PEERCRED names
//     who called; under the effective ids of the process
//   - F_SETOWN, O_ASYNC, and locks
//
// The helpers of a restore lie above every number that is wanted and are gone
// when it returns. POSIX locks come last, as any close of the file drops them.
// Sockets and paths are those of our own network and mount namespaces: the
// target must be in the same network namespace, or its sockets come from ours.
//
// # At the switch
//
// With --tcp close an established connection becomes a socket that was really
// connected, over the loopback device, and reset by its peer, so that errors,
// poll and epoll are the kernel's own. At the source FindTCP, before the switch,
// and Destroy, after it, end the listeners and reset the connections, because
// the frozen copy cannot close them and its clients would wait for it. Nothing
// ends UDP and unix sockets there before the copy is killed; clients of these do
// not follow to another host in any case. Listeners that another process holds
// too (socket activation) are left alone.
//
// What is not carried although it is accepted, and noted so in the log:
// connections not accepted yet, unread datagrams of UDP. A disabled EPOLLONESHOT
// registration comes back with EPOLLERR and EPOLLHUP enabled, as the kernel adds
// them to any registration. A unix socket bound to a relative path comes back
// bound to the absolute one. A file lock must be free at the destination: on a
// file system that both hosts share it is still held by the source.
//
// Nothing here starts a goroutine or keeps state between calls. Times are in
// nanoseconds, sizes in bytes.
package fds
