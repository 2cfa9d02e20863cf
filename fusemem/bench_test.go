package fusemem

import (
	"strconv"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

// Reading through the mount is measured beside go-fuse alone: see perf/bench, BenchmarkShown.

// benchSize is how many bytes of memory are stored.
const benchSize = 512 << 20

// Pages that came are put into the page cache, into an empty one.
func BenchmarkStore(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.FUSE, testutil.Memory(3*benchSize))
	m := start(b, spec{VMAs: []VMA{vma(0, benchSize)}, InMemory: benchSize})
	f := m.open("mem")
	var took float64
	b.SetBytes(benchSize)
	for b.Loop() {
		b.StopTimer()
		if err := unix.Fadvise(int(f.Fd()), 0, benchSize, unix.FADV_DONTNEED); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		ns, err := strconv.ParseFloat(m.do("storeall"), 64)
		if err != nil {
			b.Fatal(err)
		}
		took += ns
	}
	b.ReportMetric(benchSize*float64(b.N)/took*1e9/(1<<30), "GiB/s")
}
