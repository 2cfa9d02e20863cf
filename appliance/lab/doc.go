// Package lab makes hosts on this machine, for the demo, the throughput suite
// and tests: each with network, mount, pid, IPC, UTS and cgroup namespaces of
// its own, a private /run, /var/lib and /dev/shm, a host name and a cgroup v2
// subtree. A process that moves from one to another keeps its pid, because each
// has its own pid namespace.
//
// Every two hosts are joined by a veth pair of their own, and the lab itself
// stands in a network namespace beside them, joined to each, from which Dial
// connects as a client elsewhere would. Nothing appears in the machine's own
// network.
//
// Life cycle: a host is held by an init process, which is this program run
// again (see Main) and which reaps. The init ends when the pipe from the lab
// does: with Close, and also when the program is killed, and with it end all
// processes, mounts and networks of the host. What a kill -9 leaves are empty
// cgroups and a directory, which the next New removes.
//
// Programs using it must call Main first thing in main or TestMain.
//
// Goroutines: one per running program, which waits for it. Start and Dial run a
// moment on a locked thread that has entered the host's namespaces and ends
// afterwards.
package lab
