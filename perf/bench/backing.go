package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
)

// Back touches as much free memory as g has, and frees it again. A virtual
// machine's free memory may not be there at all: its host takes it back (free
// page reporting) and gives it out when it is touched, which can cost several
// times what a page fault does. What is measured after this is the kernel and
// not the hypervisor: the pages freed last are given out first.
func (g *Guest) Back() error {
	b, err := os.ReadFile(filepath.Join(g.Host.Root(), "proc", strconv.Itoa(g.PID), "statm"))
	if err != nil {
		return err
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return fmt.Errorf("statm of process %d: %q", g.PID, b)
	}
	resident, err := strconv.Atoi(f[1])
	if err != nil {
		return err
	}
	return back(resident*page.Size + backMargin)
}

// backMargin is for page tables, buffers and the pager.
const backMargin = 256 << 20

func back(bytes int) error {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err
	}
	if free, ok := kib(text, "MemAvailable"); ok {
		bytes = min(bytes, int(free)/2) // the guest that arrives needs some too
	}
	m, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("touch %d bytes of free memory: %w", bytes, err)
	}
	// In single pages, as they are placed.
	_ = unix.Madvise(m, unix.MADV_NOHUGEPAGE)
	err = unix.Madvise(m, unix.MADV_POPULATE_WRITE)
	if merr := unix.Munmap(m); err == nil {
		err = merr
	}
	if err != nil {
		return fmt.Errorf("touch %d bytes of free memory: %w", bytes, err)
	}
	return nil
}
