// Init is the first and only program of the guest's initramfs: it loads the
// modules, makes the host's file system the root, with a throw-away layer over
// it, runs one command as root and turns the machine off.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pageferry/pageferry/test/vm/link"
	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init is for the guest of test/vm only")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("guest:", err) // to the console
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := early(); err != nil {
		return err
	}
	host, err := openLink()
	if err != nil {
		return err
	}
	if err := serve(host); err != nil {
		_ = link.Write(host, link.KindFailed, []byte(err.Error()))
		return err
	}
	return nil
}

func serve(host *os.File) error {
	kind, payload, err := link.Read(host)
	if err != nil {
		return err
	}
	var start link.Start
	if kind != link.KindStart {
		return fmt.Errorf("the host began with a frame of kind %d", kind)
	}
	if err := json.Unmarshal(payload, &start); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := enterRoot(start.Keep); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	if err := processors(); err != nil {
		return err
	}
	return command(host, start)
}

// processors starts those that the kernel has left out (maxcpus=1).
func processors() error {
	list, err := filepath.Glob("/sys/devices/system/cpu/cpu[1-9]*/online")
	if err != nil {
		return err
	}
	for _, path := range list {
		if err := os.WriteFile(path, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}

// openLink opens the port that leads to the host. It blocks as files do, not by
// the poller: nobody else needs the thread.
func openLink() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(b)) != link.Port {
			continue
		}
		path := "/dev/" + filepath.Base(filepath.Dir(name))
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	return nil, fmt.Errorf("no virtio port %s among %q", link.Port, names)
}
