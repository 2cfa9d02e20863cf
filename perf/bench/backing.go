package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
)

// Backing is memory that was touched and is freed as a guest that arrives needs
// some. A virtual machine's free memory may not be there at all: its host takes
// it back (free page reporting) and gives it out when it is touched, which can
// cost several times what a page fault does. What is measured over a backing is
// the kernel and not the hypervisor: pages freed last are given out first. It is
// not freed all at once because the more is free, the sooner the host takes it.
type Backing struct {
	chunks [][]byte
	stop   chan struct{}
	done   sync.WaitGroup
	err    error
}

const (
	backChunk = 128 << 20
	// backAhead is how much is free and not yet used; page tables, buffers and
	// the pager need some too.
	backAhead = 384 << 20
	// backLook is how often it is looked how much is used, at most 60 us each.
	backLook = 10 * time.Millisecond
)

// Back touches as much free memory as g has and begins to free it; where there is
// not twice as much, it frees some of it at once. Release ends that.
func (g *Guest) Back() (*Backing, error) {
	b, err := os.ReadFile(filepath.Join(g.Host.Root(), "proc", strconv.Itoa(g.PID), "statm"))
	if err != nil {
		return nil, err
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return nil, fmt.Errorf("statm of process %d: %q", g.PID, b)
	}
	resident, err := strconv.Atoi(f[1])
	if err != nil {
		return nil, err
	}
	return back(resident*page.Size + backAhead)
}

// back touches bytes and leaves so many free: whoever decides whether the guest may
// come must find room for it.
func back(bytes int) (*Backing, error) {
	b := &Backing{stop: make(chan struct{})}
	free, err := available()
	if err != nil {
		return nil, err
	}
	for left := min(bytes, free-backAhead); left > 0; left -= backChunk {
		m, err := unix.Mmap(-1, 0, backChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err == nil {
			b.chunks = append(b.chunks, m)
			_ = unix.Madvise(m, unix.MADV_NOHUGEPAGE) // single pages, as they are placed
			err = unix.Madvise(m, unix.MADV_POPULATE_WRITE)
		}
		if err != nil {
			close(b.stop)
			_ = b.Release()
			return nil, fmt.Errorf("touch free memory: %w", err)
		}
	}
	for len(b.chunks) > 0 {
		if free, err = available(); err == nil && free < bytes+backAhead {
			err = unix.Munmap(b.chunks[0])
		} else if err == nil {
			break
		}
		if err != nil {
			close(b.stop)
			_ = b.Release()
			return nil, err
		}
		b.chunks = b.chunks[1:]
	}
	before, err := anonymous()
	if err != nil {
		_ = b.Release()
		return nil, err
	}
	b.done.Go(func() { b.err = b.follow(before) })
	return b, nil
}

// follow frees chunks so that backAhead is free.
func (b *Backing) follow(before int) error {
	tick := time.NewTicker(backLook)
	defer tick.Stop()
	freed := 0
	for len(b.chunks) > 0 {
		now, err := anonymous()
		if err != nil {
			return err
		}
		for used := now - before + freed; len(b.chunks) > 0 && freed-used < backAhead; freed += backChunk {
			if err := unix.Munmap(b.chunks[0]); err != nil {
				return err
			}
			b.chunks = b.chunks[1:]
		}
		select {
		case <-tick.C:
		case <-b.stop:
			return nil
		}
	}
	return nil
}

// Release frees what is left.
func (b *Backing) Release() error {
	select {
	case <-b.stop:
	default:
		close(b.stop)
	}
	b.done.Wait()
	err := b.err
	for _, m := range b.chunks {
		if e := unix.Munmap(m); err == nil {
			err = e
		}
	}
	b.chunks = nil
	return err
}

// anonymous is how much of all memory is that of programs, and available how much
// programs could get.
func anonymous() (int, error) { return meminfo("AnonPages") }
func available() (int, error) { return meminfo("MemAvailable") }

func meminfo(name string) (int, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	n, ok := kib(text, name)
	if !ok {
		return 0, fmt.Errorf("no %s in /proc/meminfo", name)
	}
	return int(n), nil
}
