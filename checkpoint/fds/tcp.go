package fds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// TCP are the TCP sockets of a process that is to be moved away, found before
// the switch so that ending them at the switch takes no time.
type TCP struct {
	pid    int
	inodes map[uint32]bool // of the process alone
	shared map[uint32]bool // that another process has open as well
}

// Destroyed counts what Destroy has ended.
type Destroyed struct {
	Connections int // reset towards their peers
	Listeners   int // closed, connections that waited in them reset
	Shared      int // left alone, because another process has them open too
}

// FindTCP lists the sockets of a process, which is frozen: what it opens later
// is not found.
func FindTCP(pid int) (*TCP, error) {
	own, err := socketsOf(pid)
	if err != nil {
		return nil, fmt.Errorf("list sockets of process %d: %w", pid, err)
	}
	t := &TCP{pid: pid, inodes: own, shared: make(map[uint32]bool)}
	if len(own) == 0 {
		return t, nil
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, d := range procs {
		other, err := strconv.Atoi(d.Name())
		if err != nil || other == pid || other == os.Getpid() {
			continue
		}
		theirs, err := socketsOf(other)
		if err != nil {
			continue // it has ended
		}
		for ino := range theirs {
			if own[ino] {
				t.shared[ino] = true
			}
		}
	}
	return t, nil
}

// socketsOf lists the inodes of a process's sockets.
func socketsOf(pid int) (map[uint32]bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	out := make(map[uint32]bool)
	buf := make([]byte, 64)
	for _, n := range names {
		k, err := unix.Readlinkat(int(d.Fd()), n, buf)
		if err != nil {
			continue
		}
		s, ok := strings.CutPrefix(string(buf[:k]), "socket:[")
		if !ok {
			continue
		}
		if ino, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 32); err == nil {
			out[uint32(ino)] = true
		}
	}
	return out, nil
}

// Destroy ends the listeners and then the connections, by the kernel's socket
// diagnosis (SOCK_DESTROY): each peer gets a reset at once and connects again,
// while the frozen process keeps its descriptors. It is for after the switch:
// nothing undoes it. It sees the sockets of our own network namespace.
func (t *TCP) Destroy() (Destroyed, error) {
	var done Destroyed
	diag, err := sys.OpenSockDiag()
	if err != nil {
		return done, err
	}
	defer diag.Close()
	const every = ^uint32(0) &^ (1 << 6) // but TIME_WAIT, which is nobody's
	var found []sys.InetSocket
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		all, err := diag.Inet(family, unix.IPPROTO_TCP, every)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range all {
			switch {
			case !t.inodes[s.Inode] || s.Inode == 0:
			case t.shared[s.Inode]:
				done.Shared++
			default:
				found = append(found, s)
			}
		}
	}
	end := func(listeners bool, count *int) {
		for i := range found {
			if s := &found[i]; (s.State == tcpListen) == listeners {
				err := diag.Destroy(unix.IPPROTO_TCP, s)
				if err == nil {
					*count++
				} else if !errors.Is(err, unix.ENOENT) {
					errs = append(errs, err)
				}
			}
		}
	}
	end(true, &done.Listeners)
	end(false, &done.Connections)
	if err := errors.Join(errs...); err != nil {
		return done, fmt.Errorf("end TCP sockets of process %d: %w", t.pid, err)
	}
	return done, nil
}

// DestroyTCP is FindTCP and Destroy.
func DestroyTCP(pid int) (Destroyed, error) {
	t, err := FindTCP(pid)
	if err != nil {
		return Destroyed{}, err
	}
	return t.Destroy()
}

// Listener is an address at which others reach a process.
type Listener struct {
	FD      int    `json:"fd"`
	Network string `json:"network"` // tcp, udp, unix
	Address string `json:"address"`
	Backlog int    `json:"backlog,omitempty"`
}

func (l Listener) String() string { return l.Network + " " + l.Address }

// Listeners lists what of these open files others can reach: listening sockets,
// and UDP and unix sockets that are bound.
func Listeners(files []OpenFile) []Listener {
	var out []Listener
	for i := range files {
		f := &files[i].File
		s := f.Socket
		if s == nil || s.State != image.SocketListening && s.State != image.SocketBound {
			continue
		}
		l := Listener{FD: files[i].FDs[0], Network: files[i].Kind, Address: addrString(s.Local), Backlog: s.Backlog}
		if f.Path != "" {
			l.Address = f.Path
		}
		switch l.Network {
		case "tcp", "udp", "unix":
			out = append(out, l)
		}
	}
	return out
}

// ListenersOf is Listeners of a process.
func ListenersOf(ctx context.Context, pid int) ([]Listener, error) {
	files, err := Examine(ctx, pid, Options{TCPClose: true})
	if err != nil {
		return nil, err
	}
	return Listeners(files), nil
}
