package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
)

// baseDir holds one directory per lab, locked by whoever runs it.
const baseDir = "/run/pageferry-labs"

// Config is what a lab is made of. The zero value is two hosts, a and b.
type Config struct {
	// Name tells labs apart, in cgroups and directories. Default: from the
	// process id.
	Name string
	// Hosts are the names of the hosts. Default: a and b.
	Hosts []string
	// Subnet numbers the hosts, from .1 on; the lab itself is .254. It is seen
	// inside only. Default 10.77.0.0/24.
	Subnet netip.Prefix
	// MTU of the links. Default: the kernel's, 1500.
	MTU int
	// Addrs, one for each host, are addresses of this network namespace. The hosts
	// then share it, and nothing is done to it: soft-RoCE devices, for one, are in the
	// first namespace only. Default: each host has a namespace of its own.
	Addrs []netip.Addr
	// Executable is run again as the hosts' init. Default /proc/self/exe.
	Executable string
}

var namePattern = regexp.MustCompile(`^[a-zA-Z0-9-]{1,32}$`)

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	if c.Name != "" && !namePattern.MatchString(c.Name) {
		return fmt.Errorf("lab: name %q: want letters, digits and hyphens, at most 32", c.Name)
	}
	if len(c.Hosts) > 8 {
		return fmt.Errorf("lab: %d hosts: at most 8", len(c.Hosts))
	}
	seen := map[string]bool{}
	for _, h := range c.Hosts {
		// The name is part of an interface's name, of at most 15 bytes.
		if !namePattern.MatchString(h) || len(h) > 12 || seen[h] || h == "lab" {
			return fmt.Errorf("lab: host name %q: want up to 12 letters, digits and hyphens, each once, not \"lab\"", h)
		}
		seen[h] = true
	}
	if c.Subnet.IsValid() && (!c.Subnet.Addr().Is4() || c.Subnet.Bits() > 24) {
		return fmt.Errorf("lab: subnet %v: want IPv4 of at most /24", c.Subnet)
	}
	if len(c.Addrs) > 0 && len(c.Addrs) != max(2, len(c.Hosts)) {
		return fmt.Errorf("lab: %d addresses for %d hosts", len(c.Addrs), max(2, len(c.Hosts)))
	}
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65535) {
		return fmt.Errorf("lab: MTU %d: want 576 to 65535", c.MTU)
	}
	return nil
}

var labs atomic.Uint32

func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = fmt.Sprintf("%d-%d", os.Getpid(), labs.Add(1))
	}
	if len(c.Hosts) == 0 {
		c.Hosts = []string{"a", "b"}
	}
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.77.0.0/24")
	}
	if c.Executable == "" {
		c.Executable = "/proc/self/exe"
	}
	return c
}

// Lab is a number of hosts. Its methods are safe for concurrent use.
type Lab struct {
	cfg    Config
	dir    string
	lock   *os.File
	cgroup string
	net    netns.NsHandle // where Dial stands
	addr   netip.Addr
	hosts  []*Host

	closing sync.Once
	err     error
}

// New makes a lab. It needs root. On failure nothing is left of it. The lab
// ends with Close or with this process, whatever ends it.
func New(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: making hosts needs root: run it with sudo")
	}
	cfg = cfg.withDefaults()
	removeStale()

	l := &Lab{cfg: cfg, net: netns.None()}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := l.claim(); err != nil {
		return nil, err
	}
	root, err := cgroup.Root()
	if err != nil {
		return nil, err
	}
	l.cgroup = filepath.Join(root.Dir(), cgroupPrefix+cfg.Name)
	if err := os.Mkdir(l.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if len(cfg.Addrs) > 0 {
		l.net, err = netns.Get()
	} else {
		l.net, err = newNetNS()
	}
	if err != nil {
		return nil, fmt.Errorf("lab: network namespace: %w", err)
	}
	first := cfg.Subnet.Masked().Addr()
	for i, name := range cfg.Hosts {
		first = first.Next()
		if len(cfg.Addrs) > 0 {
			first = cfg.Addrs[i]
		}
		h, err := l.newHost(ctx, name, first)
		if h != nil {
			l.hosts = append(l.hosts, h)
		}
		if err != nil {
			return nil, fmt.Errorf("lab: host %s: %w", name, err)
		}
	}
	if len(cfg.Addrs) > 0 {
		l.addr = cfg.Addrs[0]
		return l, nil
	}
	last := cfg.Subnet.Masked().Addr().As4()
	last[3] = 254
	l.addr = netip.AddrFrom4(last)
	if err := l.connect(); err != nil {
		return nil, fmt.Errorf("lab: network: %w", err)
	}
	return l, nil
}

// Hosts in the order of the configuration.
func (l *Lab) Hosts() []*Host { return l.hosts }

// Host by its name; nil where there is none.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.hosts {
		if h.name == name {
			return h
		}
	}
	return nil
}

// Addr is where clients who Dial come from.
func (l *Lab) Addr() netip.Addr { return l.addr }

// Close ends every process of every host and removes all that the lab made.
// Idempotent, and safe at any time.
func (l *Lab) Close() error {
	l.closing.Do(func() {
		var errs []error
		for _, h := range l.hosts {
			errs = append(errs, h.close())
		}
		if l.net.IsOpen() {
			errs = append(errs, l.net.Close())
		}
		if l.cgroup != "" {
			errs = append(errs, removeCgroups(l.cgroup))
		}
		if l.lock != nil {
			errs = append(errs, os.RemoveAll(l.dir), l.lock.Close())
			_ = os.Remove(baseDir) // stays while there are other labs
		}
		l.err = errors.Join(errs...)
	})
	return l.err
}

// onThread runs f on an operating system thread of its own, which ends with f:
// f may change the thread's namespaces.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The runtime does not end the main thread, only parks it, and its
			// namespaces are what /proc/self shows of this program. While it is
			// ours f gets another.
			err := onThread(f)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		done <- f() // no unlock: the thread ends with the goroutine
	}()
	return <-done
}

func newNetNS() (ns netns.NsHandle, err error) {
	ns = netns.None()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		ns, err = netns.GetFromThread(os.Getpid(), unix.Gettid())
		return err
	})
	return ns, err
}
