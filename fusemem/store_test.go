package fusemem

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// What was stored is not read from a Source any more.
func TestStore(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Files: []fileSpec{{Path: "/f", Size: 1<<20 + 100}, {Path: "/g", Size: 10}}})
	// Nobody has looked at it: there is nothing to store into, and no error.
	m.do("storemem %d %d", 0x400000, 0x80000)
	mem, file, small, image := m.open("mem"), m.open("map/0"), m.open("map/1"), m.open("map/image")
	m.do("storemem %d %d", 0x400000, 0x80000)
	m.do("storefile 0 %d 0", 2<<20) // more than there is
	m.do("storefile 0 %d 1", page.Size)
	m.do("storeimage %d %d", 5<<44, 3<<20)
	m.do("storeimage %d %d", int64(imageSize-page.Size), page.Size)
	calls := m.do("calls")
	for _, c := range []struct {
		f      *os.File
		at     int64
		expect []byte
	}{
		{mem, 0x400000, want(tagMem, 0x400, 0x80)}, {file, 0, want(tagFile, 0, 257)[:1<<20+100]}, {small, 0, want(tagFile+1, 0, 1)[:10]},
		{image, 5 << 44, want(tagImage, 5<<32, 768)}, {image, imageSize - page.Size, want(tagImage, imageSize>>page.Shift-1, 1)},
	} {
		got := make([]byte, len(c.expect))
		if c.f == file || c.f == small {
			got = append(got, make([]byte, 3*page.Size)...) // there is no more
		}
		n, err := c.f.ReadAt(got, c.at)
		if e := diff(got[:n], c.expect); e != nil || n == len(got) && err != nil {
			t.Errorf("%s at %#x: %v, %v", c.f.Name(), c.at, e, err)
		}
		if m.do("calls") != calls {
			t.Errorf("%s: what was stored was asked for", c.f.Name())
			calls = m.do("calls")
		}
	}
	for f, size := range map[*os.File]int64{mem: memSize, file: 1<<20 + 100, small: 10, image: imageSize} {
		if st, err := f.Stat(); err != nil || st.Size() != size {
			t.Errorf("%s has %d bytes now, %v", f.Name(), st.Size(), err)
		}
	}
	// Who opens it later finds what is cached.
	if _, err := m.open("mem").ReadAt(make([]byte, page.Size), 0x400000); err != nil || m.do("calls") != calls {
		t.Errorf("opened again: %v, %s calls instead of %s", err, m.do("calls"), calls)
	}
	m.do("close")
	for _, line := range []string{"storemem 4194304 4096", "invalidate 0 4096"} {
		if a := <-m.ask("%s", line); a != "error "+ErrClosed.Error() {
			t.Errorf("%s after Close: %s", line, a)
		}
	}
}

// A store beside READs that are under way ends, while they wait.
func TestStoreBesideReads(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Hold: true})
	const at, size = 7 << 44, 4 << 20
	image := m.open("map/image")
	var readers []*reader
	for _, p := range []uint64{0, 3, 4, 200, 1023} {
		readers = append(readers, m.reader("map/image", "mmaprandom", at+p<<page.Shift, page.Size))
	}
	m.waiting(len(readers))
	m.do("storeimage %d %d", at, size)
	for _, r := range readers {
		if !r.Alive() {
			t.Error("a reader did not wait")
		}
	}
	calls := m.do("calls")
	buf := make([]byte, 4*page.Size)
	if _, err := image.ReadAt(buf[:2*page.Size], at+page.Size); err != nil {
		t.Error(err)
	}
	if err := diff(buf[:2*page.Size], want(tagImage, at>>page.Shift+1, 2)); err != nil {
		t.Error(err)
	}
	if m.do("calls") != calls {
		t.Error("what lies between READs was not stored")
	}
	m.do("release")
	for i, p := range []page.Num{0, 3, 4, 200, 1023} {
		readers[i].mustRead(t, want(tagImage, at>>page.Shift+p, 1))
	}
}

// Who waits for READs of a part of a file waits for those, and for no others.
func TestAwaitFile(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Files: []fileSpec{{Path: "/f", Size: 1 << 20}, {Path: "/g", Size: 1 << 20}}, Hold: true})
	r := m.reader("map/0", "mmaprandom", 7*page.Size, page.Size)
	m.waiting(1)
	m.do("awaitfile %d %d 0", 0, 7*page.Size)
	m.do("awaitfile %d %d 0", 8*page.Size, 100*page.Size)
	m.do("awaitfile %d %d 1", 0, 1<<20)
	await := m.ask("awaitfile %d %d 0", 6*page.Size, page.Size+1)
	select {
	case a := <-await:
		t.Fatalf("it did not wait: %s", a)
	case <-time.After(20 * time.Millisecond): // a hundred times as long as it looks away
	}
	m.do("release")
	if a := <-await; a != "ok" {
		t.Errorf("it waited, and then: %q", a)
	}
	r.mustRead(t, want(tagFile, 7, 1))
}

// Stores and readers at random, on the same pages: nothing stops, and nothing is wrong.
func TestStoreRandom(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	for _, procs := range []string{"1", "2"} {
		t.Run("GOMAXPROCS="+procs, func(t *testing.T) {
			testutil.NoLeaks(t)
			t.Setenv("GOMAXPROCS", procs)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			m := start(t, spec{VMAs: someVMAs, Image: true, Seed: seed, Delay: 200 * time.Microsecond})
			const pages = 2048
			mem := m.open("mem")
			var over atomic.Bool
			var wg sync.WaitGroup
			for i := range uint64(3) {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(seed, i))
					buf := make([]byte, 64*page.Size)
					for !over.Load() {
						p, n := r.IntN(pages-64), 1+r.IntN(64)
						if _, err := mem.ReadAt(buf[:n*page.Size], 0x7f0000000000+int64(p)*page.Size); err != nil {
							t.Error(err)
							return
						}
						if err := diff(buf[:n*page.Size], want(tagMem, 0x7f0000000+page.Num(p), n)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			r := rand.New(rand.NewPCG(seed, 99))
			for range 300 {
				p, n := r.IntN(pages-64), 1+r.IntN(64)
				m.do("storemem %d %d", 0x7f0000000000+p*page.Size, n*page.Size)
				if r.IntN(10) == 0 { // what is cached goes
					_ = unix.Fadvise(int(mem.Fd()), 0x7f0000000000, pages*page.Size, unix.FADV_DONTNEED)
				}
			}
			over.Store(true)
			wg.Wait()
		})
	}
}

// After InvalidateImage nobody sees what the image was before, whoever had it mapped, cached, or a
// READ of it under way.
func TestInvalidate(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{Image: true, Delay: 300 * time.Microsecond})
	const pages = 256
	image := m.open("map/image")
	watcher := m.watch(pages)
	var oldest atomic.Uint64 // generation that may be seen
	var over atomic.Bool
	var wg sync.WaitGroup
	for i := range uint64(3) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, i))
			buf := make([]byte, 16*page.Size)
			for !over.Load() {
				p, n := r.IntN(pages-16), 1+r.IntN(16)
				from := oldest.Load()
				if _, err := image.ReadAt(buf[:n*page.Size], int64(p)*page.Size); err != nil {
					t.Error(err)
					return
				}
				for k := range n {
					if err := generation(buf[k*page.Size:][:page.Size], page.Num(p+k), from, oldest.Load()+1); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for gen := range uint64(100) {
		watcher.see(t, gen)
		m.do("gen %d", gen+1)
		m.do("invalidate 0 %d", pages*page.Size)
		oldest.Store(gen + 1)
		if gen%10 == 0 {
			m.do("storeimage 0 %d", pages*page.Size)
		}
	}
	watcher.see(t, 100)
	over.Store(true)
	wg.Wait()
	// A READ that was under way before, with what was then, is waited for; others are not.
	m.do("hold")
	r := m.reader("map/image", "mmaprandom", 1<<30, page.Size)
	m.waiting(1)
	m.do("gen 1000")
	m.do("invalidate %d %d", 0, pages*page.Size)
	answer := m.ask("invalidate %d %d", 1<<30, page.Size)
	select {
	case a := <-answer:
		t.Errorf("did not wait: %s", a)
	case <-time.After(100 * time.Millisecond):
	}
	m.do("release")
	if a := <-answer; a != "ok " && a != "ok" {
		t.Error(a)
	}
	// Its thread began before, so it may see the one or the other.
	got, status := r.result(t)
	if diff(got, want(tagImage+100<<8, 1<<30>>page.Shift, 1)) != nil && diff(got, want(tagImage+1000<<8, 1<<30>>page.Shift, 1)) != nil {
		t.Errorf("a reader: status %d, %d bytes of neither generation", status, len(got))
	}
	m.reader("map/image", "mmap", 1<<30, page.Size).mustRead(t, want(tagImage+1000<<8, 1<<30>>page.Shift, 1))
}

// generation checks that a page is of one of the generations from, ..., to.
func generation(b []byte, p page.Num, from, to uint64) error {
	var err error
	for g := from; g <= to; g++ {
		if err = diff(b, want(tagImage+g<<8, p, 1)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("page %d is of none of the generations %d to %d: %w", p, from, to, err)
}
