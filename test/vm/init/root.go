package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is one call of mount(2), at a directory that it makes.
type mount struct {
	what, at, kind string
	flags          uintptr
	data           string
}

func mountAll(list ...mount) error {
	for _, m := range list {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.what, m.at, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s (%s): %w", m.at, m.kind, err)
		}
	}
	return nil
}

// early makes the kernel's own file systems.
func early() error {
	err := mountAll(
		mount{"proc", "/proc", "proc", 0, ""},
		mount{"sysfs", "/sys", "sysfs", 0, ""},
		mount{"devtmpfs", "/dev", "devtmpfs", 0, "mode=755"},
	)
	if err != nil {
		return err
	}
	return unix.Sethostname([]byte("guest"))
}

// loadModules loads what /modules/order names, in its order.
func loadModules() error {
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(order)) {
		f, err := os.Open("/modules/" + name + ".ko")
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		// Some are for a processor that this one is not: ENODEV.
		if err != nil && err != unix.EEXIST && err != unix.ENODEV {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

const newRoot = "/root"

// enterRoot makes the host's / the root, under a layer in memory that takes what
// is written. /tmp and /run are empty, but for the host's directories in /tmp
// that lead to one of keep.
func enterRoot(keep []string) error {
	err := mountAll(
		// The host's files hardly change meanwhile: they may be cached.
		mount{"host", "/host", "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose"},
		mount{"tmpfs", "/layer", "tmpfs", 0, "size=75%"},
	)
	if err != nil {
		return err
	}
	for _, dir := range []string{"/layer/upper", "/layer/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	err = mountAll(mount{"overlay", newRoot, "overlay", 0,
		"lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work,index=off,metacopy=off"})
	if err != nil {
		return err
	}
	kept, err := openKept(keep)
	if err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	err = mountAll(
		mount{"tmpfs", newRoot + "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		mount{"tmpfs", newRoot + "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		mount{"tmpfs", newRoot + "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		mount{"devpts", newRoot + "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=620,ptmxmode=666"},
		mount{"cgroup2", newRoot + "/sys/fs/cgroup", "cgroup2", 0, ""},
	)
	if err != nil {
		return err
	}
	for name, fd := range kept {
		at := newRoot + "/tmp/" + name
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("keep /tmp/%s: %w", name, err)
		}
		_ = unix.Close(fd)
	}
	return switchRoot()
}

// openKept opens those entries of the host's /tmp that lead to one of keep,
// before something is mounted over it.
func openKept(keep []string) (map[string]int, error) {
	kept := map[string]int{}
	for _, path := range keep {
		rest, ok := strings.CutPrefix(filepath.Clean(path), "/tmp/")
		if !ok {
			continue
		}
		name, _, _ := strings.Cut(rest, "/")
		if _, ok := kept[name]; ok {
			continue
		}
		at := newRoot + "/tmp/" + name
		if st, err := os.Stat(at); err != nil || !st.IsDir() {
			continue
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("open_tree %s: %w", at, err)
		}
		kept[name] = fd
	}
	return kept, nil
}

// switchRoot is switch_root(8): with chroot alone a user namespace could not be
// made, user_namespaces(7).
func switchRoot() error {
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

// network brings the loopback device up.
func network() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("SIOCSIFFLAGS lo", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo))
}
