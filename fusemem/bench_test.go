package fusemem

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// benchSize is how many bytes of memory the benchmarks read through.
const benchSize = 512 << 20

// bareFile is what go-fuse makes of a file without us: the yardstick.
type bareFile struct {
	gofs.Inode
	data []byte
}

func (f *bareFile) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Size, out.Mode = uint64(len(f.data)), 0o400
	return 0
}

func (f *bareFile) Open(context.Context, uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (f *bareFile) Read(_ context.Context, _ gofs.FileHandle, buf []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(buf[:copy(buf, f.data[off:])]), 0
}

type bareRoot struct {
	gofs.Inode
	file bareFile
}

func (r *bareRoot) OnAdd(ctx context.Context) {
	r.AddChild("mem", r.NewPersistentInode(ctx, &r.file, gofs.StableAttr{Mode: unix.S_IFREG, Ino: 2}), false)
}

// serveBare is the child process that serves one such file until its input ends.
func serveBare(dir string) {
	root := &bareRoot{file: bareFile{data: inMemory(benchSize).(memory)}}
	timeout := time.Hour
	srv, err := gofs.Mount(dir, root, &gofs.Options{AttrTimeout: &timeout, EntryTimeout: &timeout, MountOptions: fuse.MountOptions{
		DirectMountStrict: true, Name: fsName, FsName: fsName, MaxWrite: maxRequest, MaxBackground: 64, DisableSplice: true, ExplicitDataCacheControl: true, DisableXAttrs: true}})
	if err != nil {
		fail(err)
	}
	m, err := findMount(dir)
	if err == nil {
		err = os.WriteFile(fmt.Sprintf("/sys/class/bdi/0:%d/read_ahead_kb", m.minor), []byte("1024"), 0)
	}
	if err != nil {
		fail(err)
	}
	fmt.Println("ready 0")
	_, _ = os.Stdin.Read(make([]byte, 1))
	_ = Unmount(dir)
	srv.Wait()
	os.Exit(0)
}

// benchFile opens the file of benchSize bytes that a benchmark reads.
func benchFile(b *testing.B, what string) *os.File {
	b.Helper()
	testutil.Require(b, testutil.Root, testutil.FUSE, testutil.Memory(3*benchSize))
	name := ""
	switch what {
	case "tmpfs":
		f, err := os.CreateTemp("/dev/shm", "pageferry-bench")
		if err != nil {
			b.Fatal(err)
		}
		name = f.Name()
		b.Cleanup(func() { os.Remove(name) })
		if _, err := f.Write(inMemory(benchSize).(memory)); err != nil {
			b.Fatal(err)
		}
		f.Close()
	case "gofuse":
		name = filepath.Join(start(b, spec{Bare: true}).dir, "mem")
	default:
		name = filepath.Join(start(b, spec{VMAs: []VMA{vma(0, benchSize)}, InMemory: benchSize}).dir, what)
	}
	f, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return f
}

// drop has the page cache forget a file; tmpfs keeps it.
func drop(b *testing.B, f *os.File) {
	if err := unix.Fadvise(int(f.Fd()), 0, benchSize, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

var benchFiles = []string{"mem", "vma/00000000-20000000", "gofuse", "tmpfs"}

func BenchmarkSequentialRead(b *testing.B) {
	for _, what := range benchFiles {
		b.Run(what, func(b *testing.B) {
			f := benchFile(b, what)
			buf := make([]byte, 1<<20)
			b.SetBytes(benchSize)
			for b.Loop() {
				b.StopTimer()
				drop(b, f)
				b.StartTimer()
				for at := int64(0); at < benchSize; at += int64(len(buf)) {
					if n, err := f.ReadAt(buf, at); n < len(buf) {
						b.Fatal(n, err)
					}
				}
			}
		})
	}
}

// sink keeps the compiler from leaving accesses out.
var sink byte

func BenchmarkSequentialTouch(b *testing.B) {
	for _, what := range benchFiles {
		b.Run(what, func(b *testing.B) {
			f := benchFile(b, what)
			b.SetBytes(benchSize)
			for b.Loop() {
				b.StopTimer()
				drop(b, f)
				m, err := unix.Mmap(int(f.Fd()), 0, benchSize, unix.PROT_READ, unix.MAP_PRIVATE)
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				for at := 0; at < benchSize; at += page.Size {
					sink += m[at]
				}
				b.StopTimer()
				_ = unix.Munmap(m)
				b.StartTimer()
			}
		})
	}
}

// A fault on a page that the Source has and the page cache has not, by the thread that waits for
// it.
func BenchmarkRandomFault(b *testing.B) {
	for _, what := range benchFiles {
		for _, advice := range []string{"random", "normal"} {
			b.Run(what+"/"+advice, func(b *testing.B) {
				f := benchFile(b, what)
				drop(b, f)
				m, err := unix.Mmap(int(f.Fd()), 0, benchSize, unix.PROT_READ, unix.MAP_PRIVATE)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Munmap(m)
				if advice == "random" {
					_ = unix.Madvise(m, unix.MADV_RANDOM)
				}
				r := rand.New(rand.NewPCG(1, 2))
				order := r.Perm(benchSize / page.Size)
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					at := order[i%len(order)] * page.Size
					begin := time.Now()
					sink += m[at]
					took = append(took, time.Since(begin))
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
				b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
			})
		}
	}
}

// Pages that came are put into the page cache, into an empty one.
func BenchmarkStore(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.FUSE, testutil.Memory(3*benchSize))
	m := start(b, spec{VMAs: []VMA{vma(0, benchSize)}, InMemory: benchSize})
	f := m.open("mem")
	var took float64
	b.SetBytes(benchSize)
	for b.Loop() {
		b.StopTimer()
		drop(b, f)
		b.StartTimer()
		ns, err := strconv.ParseFloat(m.do("storeall"), 64)
		if err != nil {
			b.Fatal(err)
		}
		took += ns
	}
	b.ReportMetric(benchSize*float64(b.N)/took*1e9/(1<<30), "GiB/s")
}
