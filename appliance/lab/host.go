package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is one host of a lab. Its methods are safe for concurrent use.
type Host struct {
	lab    *Lab
	name   string
	addr   netip.Addr
	cgroup string

	init *exec.Cmd
	hold *os.File // the init ends when this is closed
	net  netns.NsHandle

	closing sync.Once
	err     error
}

// namespaces of a host, in the order in which a thread can enter them.
var namespaces = []struct {
	name string
	flag int
}{
	{"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS}, {"net", unix.CLONE_NEWNET},
	{"pid", unix.CLONE_NEWPID}, {"cgroup", unix.CLONE_NEWCGROUP}, {"mnt", unix.CLONE_NEWNS},
}

// newHost starts the init of a host and waits until it has everything in place.
// A host that is returned with an error must be closed.
func (l *Lab) newHost(ctx context.Context, name string, addr netip.Addr) (*Host, error) {
	h := &Host{lab: l, name: name, addr: addr, cgroup: filepath.Join(l.cgroup, name), net: netns.None()}
	if err := os.Mkdir(h.cgroup, 0o755); err != nil {
		return nil, err
	}
	cg, err := os.Open(h.cgroup)
	if err != nil {
		return h, err
	}
	defer cg.Close()
	holdR, holdW, err := os.Pipe()
	if err != nil {
		return h, err
	}
	h.hold = holdW
	defer holdR.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return h, err
	}
	defer readyR.Close()

	setup, err := json.Marshal(hostSetup{Hostname: name})
	if err != nil {
		readyW.Close()
		return h, err
	}
	cmd := exec.Command(l.cfg.Executable)
	cmd.Args = []string{initArg0, string(setup)}
	cmd.ExtraFiles = []*os.File{holdR, readyW} // descriptors 3 and 4
	cmd.Dir = "/"
	var network uintptr
	if len(l.cfg.Addrs) == 0 {
		network = unix.CLONE_NEWNET
	}
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | network,
		UseCgroupFD: true,
		CgroupFD:    int(cg.Fd()),
		Setsid:      true, // a Ctrl-C at the terminal is for the program, which closes the lab
	}
	err = cmd.Start()
	readyW.Close()
	if err != nil {
		return h, fmt.Errorf("init: %w", err)
	}
	h.init = cmd

	_ = readyR.SetReadDeadline(time.Now().Add(30 * time.Second))
	stop := context.AfterFunc(ctx, func() { _ = readyR.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(io.LimitReader(readyR, 4096)).ReadString('\n')
	switch {
	case ctx.Err() != nil:
		return h, ctx.Err()
	case err != nil:
		return h, fmt.Errorf("init said nothing: %w (does main call lab.Main?)", err)
	case strings.TrimSpace(line) != initReady:
		return h, fmt.Errorf("init: %s", strings.TrimSpace(line))
	}
	h.net, err = netns.GetFromPid(cmd.Process.Pid)
	return h, err
}

// Name of the host, also its host name.
func (h *Host) Name() string { return h.name }

// Addr is the host's address in the lab.
func (h *Host) Addr() netip.Addr { return h.addr }

// Root is the host's file system, seen from outside: Root()+"/run/x" is the
// host's /run/x. It is valid while the host is.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.init.Process.Pid) }

// Cgroup is the host's v2 subtree, seen from outside.
func (h *Host) Cgroup() string { return h.cgroup }

// Program is a program that was started in a host.
type Program struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of cmd.Wait, once done
}

// PID is what this program, outside the host, calls it.
func (p *Program) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Program) Done() <-chan struct{} { return p.done }

// Wait returns what exec.Cmd.Wait does, when the program has ended. Any number
// may wait.
func (p *Program) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal; to a program that has ended it is no error.
func (p *Program) Signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Start starts cmd as a program of the host, in a cgroup of its own that is
// named after what. It replaces cmd.SysProcAttr's cgroup fields. The program is
// waited for here, without anybody's help: a pid namespace cannot end before all
// in it were. So cmd.Wait must not be called, and cmd's pipes not be used; give
// it an *os.File or any writer.
func (h *Host) Start(what string, cmd *exec.Cmd) (*Program, error) {
	dir := filepath.Join(h.cgroup, what)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("host %s: %w", h.name, err)
	}
	cg, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", h.name, err)
	}
	defer cg.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD = true
	cmd.SysProcAttr.CgroupFD = int(cg.Fd())
	if cmd.Dir == "" {
		cmd.Dir = "/" // ours may not exist there
	}
	cmd.WaitDelay = time.Second // pipes that grandchildren hold
	if err := h.inside(cmd.Start); err != nil {
		return nil, fmt.Errorf("host %s: %w", h.name, err)
	}
	p := &Program{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// Run starts a program in the host and waits for it; what it prints is part of
// the error where it fails.
func (h *Host) Run(ctx context.Context, name string, args ...string) (output string, err error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := h.Start("run", cmd)
	if err != nil {
		return "", err
	}
	if err := p.Wait(); err != nil {
		return out.String(), fmt.Errorf("host %s: %s: %w: %s", h.name, name, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// PID is what the host calls the process that this program calls pid.
func (h *Host) PID(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(rest)
			return strconv.Atoi(f[len(f)-1])
		}
	}
	return 0, fmt.Errorf("process %d: its pid in the host is not known", pid)
}

// Inside runs f on a thread that has entered all of the host's namespaces, and
// that ends afterwards. f must not start goroutines that it needs there.
func (h *Host) Inside(f func() error) error { return h.inside(f) }

// inside runs f on a thread that has entered all of the host's namespaces.
func (h *Host) inside(f func() error) error {
	return onThread(func() error {
		// setns(2): a thread that shares its file system attributes with others
		// cannot enter a mount namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		var fds []int
		defer func() {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		for _, ns := range namespaces { // all opened before the first is entered: /proc changes with mnt
			fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", h.init.Process.Pid, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("namespace %s: %w", ns.name, err)
			}
			fds = append(fds, fd)
		}
		for i, ns := range namespaces {
			if err := unix.Setns(fds[i], ns.flag); err != nil {
				return fmt.Errorf("enter namespace %s: %w", ns.name, err)
			}
		}
		return f()
	})
}

// Dial connects from the host.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return dialIn(ctx, h.net, network, address)
}

// Dial connects from outside the hosts, as a client elsewhere would.
func (l *Lab) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return dialIn(ctx, l.net, network, address)
}

// dialIn makes the socket in ns. The address must be numeric: then net.Dialer
// makes it on the calling thread.
func dialIn(ctx context.Context, ns netns.NsHandle, network, address string) (c net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("lab: dial: %w", err)
	}
	err = onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// close ends the host's processes and waits for its init.
func (h *Host) close() error {
	h.closing.Do(func() {
		if h.net.IsOpen() {
			h.err = h.net.Close()
		}
		if h.hold != nil {
			h.hold.Close()
		}
		if h.init != nil {
			// The pipe ends it; this also ends one that hangs. All other
			// processes of a pid namespace end with its init.
			kill := time.AfterFunc(10*time.Second, func() { _ = h.init.Process.Kill() })
			_ = h.init.Wait()
			kill.Stop()
		}
	})
	return h.err
}
