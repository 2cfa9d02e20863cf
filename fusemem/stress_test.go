package fusemem

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// place is part of the mount, with what it must have.
type place struct {
	name  string
	at    int64 // of what is read
	pages int
	tag   uint64
	first page.Num // of the tag's content at the place
}

// stressPlaces follow from someVMAs and stressFiles.
var stressPlaces = []place{
	{"mem", 0x7f0000000000, 2048, tagMem, 0x7f0000000},
	{"mem", 0x600000, 256, tagMem, 0x600},
	{"mem", memSize - 0x3000, 3, tagMem, memSize>>page.Shift - 3},
	{"vma/7f0000000000-7f0000800000", 0, 2048, tagMem, 0x7f0000000},
	{"vma/00400000-00480000", 0, 128, tagMem, 0x400},
	{"files/f", 0, 1024, tagFile, 0},
	{"map/0", 0, 1024, tagFile, 0},
	{"map/image", 3 << 44, 4096, tagImage, 3 << 32},
}

// stress is the child that reads at random places, n times, by read(2) and by mappings, and drops
// what is cached now and then. It says how many reads gave bytes, which were right, and how many
// failed, as they may.
func stress(dir string, seed int64, n int) {
	// The collector would stop the world, and a thread waits in a fault.
	debug.SetGCPercent(-1)
	r := rand.New(rand.NewPCG(uint64(seed), 7))
	good, bad := 0, 0
	buf := make([]byte, 300*page.Size)
	expect := make([]byte, 300*page.Size)
	fds := map[string]int{}
	for range n {
		p := stressPlaces[r.IntN(len(stressPlaces))]
		fd, ok := fds[p.name]
		if !ok {
			var err error
			if fd, err = unix.Open(filepath.Join(dir, p.name), unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
				fail(err)
			}
			fds[p.name] = fd
		}
		from := r.IntN(p.pages)
		pages := 1 + r.IntN(min(p.pages-from, 1+r.IntN(300)))
		at := p.at + int64(from)*page.Size
		got, size := 0, pages*page.Size
		switch r.IntN(5) {
		case 0, 1:
			k, err := unix.Pread(fd, buf[:size], at)
			if err != nil && err != unix.EIO {
				fail(err)
			}
			got = max(k, 0)
		case 2, 3:
			got = copyMapped(fd, buf[:size], at, r.IntN(2) == 0, r.IntN(2) == 0)
		case 4:
			_ = unix.Fadvise(fd, at, int64(size), unix.FADV_DONTNEED)
			continue
		}
		if got < size {
			bad++
		}
		if got > 0 {
			good++
		}
		content(p.tag, p.first+page.Num(from), expect[:size])
		if err := diff(buf[:got], expect[:got]); err != nil {
			fail(fmt.Errorf("%s from page %d on, %d pages: %w", p.name, from, pages, err))
		}
	}
	fmt.Println(good, bad)
	os.Exit(0)
}

// copyMapped reads through a mapping and returns how many bytes there were before a SIGBUS.
func copyMapped(fd int, buf []byte, at int64, shared, random bool) (n int) {
	flags := unix.MAP_PRIVATE
	if shared {
		flags = unix.MAP_SHARED
	}
	b, err := unix.Mmap(fd, at, len(buf), unix.PROT_READ, flags)
	if err != nil {
		fail(err)
	}
	defer unix.Munmap(b)
	if random {
		_ = unix.Madvise(b, unix.MADV_RANDOM)
	}
	debug.SetPanicOnFault(true)
	defer func() { _ = recover() }()
	for n < len(b) {
		copy(buf[n:n+page.Size], b[n:])
		n += page.Size
	}
	return n
}

// Several processes read everything at random while the Source is slow and fails now and then. What
// they get is right.
func TestStress(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	for _, c := range []struct {
		procs string
		delay time.Duration
		fails float64
	}{{"1", 0, 0}, {"2", 200 * time.Microsecond, 0}, {"1", 200 * time.Microsecond, 0.05}, {"2", 0, 0.3}} {
		t.Run(fmt.Sprintf("GOMAXPROCS=%s delay=%v fails=%v", c.procs, c.delay, c.fails), func(t *testing.T) {
			testutil.NoLeaks(t)
			t.Setenv("GOMAXPROCS", c.procs)
			seed := rand.Int64()
			t.Logf("seed %d", seed)
			m := start(t, spec{VMAs: someVMAs, Image: true, Seed: uint64(seed), Delay: c.delay, FailRate: c.fails,
				Files: []fileSpec{{Path: "/f", Size: 1024 * page.Size}}})
			var all []*testutil.Process
			for i := range int64(4) {
				cmd := exec.Command("/proc/self/exe", m.dir, "stress", fmt.Sprint(seed+i), "400")
				cmd.Env = append(os.Environ(), envReader+"=1")
				all = append(all, testutil.StartCmd(t, cmd, 3*time.Minute))
			}
			for _, p := range all {
				err := p.Wait(2 * time.Minute)
				var good, bad int
				if _, e := fmt.Sscan(p.Text(), &good, &bad); err != nil || e != nil {
					t.Fatalf("a reader: %v: %s", err, p.Text())
				}
				if good < 100 || c.fails == 0 && bad > 0 || c.fails > 0 && bad == 0 {
					t.Errorf("%d reads gave bytes, %d failed", good, bad)
				}
			}
			if n := m.do("waiting"); n != "0" {
				t.Errorf("%s READs are left", n)
			}
		})
	}
}
