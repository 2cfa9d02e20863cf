package appliance

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// availableMemory is what a process that arrives could use, in bytes: the
// kernel's MemAvailable, or what the cgroups above the daemon leave of their
// limits, where that is less.
func availableMemory() (uint64, error) {
	free, err := memAvailable("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return min(free, cgroupHeadroom("/proc/self/cgroup", cgroupMounts)), nil
}

// cgroupMounts is where the v2 hierarchy is: alone, or beside v1.
var cgroupMounts = []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

func memAvailable(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if rest, ok := strings.CutPrefix(sc.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 54)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", path, err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("%s: no MemAvailable", path)
}

// cgroupHeadroom is the least memory.max - memory.current from the daemon's v2
// cgroup upward; no limit is MaxUint64. The arriving process is put beside the
// daemon, so what bounds the daemon's parents bounds it too.
func cgroupHeadroom(self string, mounts []string) uint64 {
	headroom := uint64(math.MaxUint64)
	data, err := os.ReadFile(self)
	if err != nil {
		return headroom
	}
	for line := range strings.Lines(string(data)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for _, m := range mounts {
			for dir := filepath.Join(m, path); strings.HasPrefix(dir, m); dir = filepath.Dir(dir) {
				limit, err1 := readNumber(filepath.Join(dir, "memory.max"))
				used, err2 := readNumber(filepath.Join(dir, "memory.current"))
				if err1 != nil || err2 != nil { // "max", or no memory controller here
					continue
				}
				headroom = min(headroom, limit-min(limit, used))
			}
		}
	}
	return headroom
}

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// portFree tries to bind and lets go at once. It does not listen: no client can
// meet the trial.
func portFree(network string, a netip.AddrPort) error {
	kind := unix.SOCK_STREAM
	if strings.HasPrefix(network, "udp") {
		kind = unix.SOCK_DGRAM
	}
	addr := a.Addr().Unmap()
	domain := unix.AF_INET
	var sa unix.Sockaddr
	if addr.Is4() {
		sa = &unix.SockaddrInet4{Port: int(a.Port()), Addr: addr.As4()}
	} else {
		domain = unix.AF_INET6
		sa = &unix.SockaddrInet6{Port: int(a.Port()), Addr: addr.As16()}
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return errors.New("this host has no IPv6")
	}
	if err != nil {
		return nil // whether it is free cannot be told; the rebuild will
	}
	defer unix.Close(fd)
	if kind == unix.SOCK_STREAM {
		// Without it connections in TIME_WAIT look like a taken port.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if domain == unix.AF_INET6 {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err := unix.Bind(fd, sa); errors.Is(err, unix.EADDRINUSE) {
		return err
	}
	return nil
}
