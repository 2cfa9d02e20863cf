package proc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// DirectIO reports whether a process has a file open that it may read past the page
// cache: one with O_DIRECT, or one of a file system that does so by itself. What is
// read so is written into the pages by a device or a server, which the kernel lets
// do so long after it has looked the pages up (pin_user_pages.rst).
func DirectIO(pid int) (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	d, err := os.Open(dir)
	if err != nil {
		return false, Gone(pid, err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return false, Gone(pid, err)
	}
	var direct []string // ids of mounts
	link := make([]byte, 64)
	for _, n := range names {
		// Sockets and the like are what a process has thousands of.
		k, err := unix.Readlinkat(int(d.Fd()), n, link)
		if err != nil || k > 0 && link[0] != '/' {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, n))
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return false, Gone(pid, err)
		}
		flags, err := strconv.ParseUint(fdinfo(info, "flags"), 8, 64)
		if err != nil {
			return false, fmt.Errorf("flags of descriptor %s of pid %d: %w", n, pid, err)
		}
		if flags&unix.O_DIRECT != 0 {
			return true, nil
		}
		if direct == nil {
			if direct, err = directMounts(pid); err != nil {
				return false, err
			}
		}
		if slices.Contains(direct, fdinfo(info, "mnt_id")) {
			return true, nil
		}
	}
	return false, nil
}

// fdinfo is the value of a line of proc_pid_fdinfo(5).
func fdinfo(b []byte, key string) string {
	for line := range bytes.Lines(b) {
		if v, ok := bytes.CutPrefix(line, []byte(key+":")); ok {
			return string(bytes.TrimSpace(v))
		}
	}
	return ""
}

// directMounts are the ids of mounts of file systems that may read past the page
// cache without O_DIRECT: FOPEN_DIRECT_IO of FUSE, and the cache options of 9p
// and SMB. Never nil.
func directMounts(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, Gone(pid, err)
	}
	ids := []string{}
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		mount, what, ok := strings.Cut(sc.Text(), " - ") // proc_pid_mountinfo(5)
		id, _, _ := strings.Cut(mount, " ")
		kind, _, _ := strings.Cut(what, " ")
		kind, _, _ = strings.Cut(kind, ".")
		switch kind {
		case "fuse", "fuseblk", "virtiofs", "9p", "cifs", "smb3":
			if ok {
				ids = append(ids, id)
			}
		}
	}
	return ids, sc.Err()
}
