package bench

import (
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport/tcp"
)

// BenchmarkShown is reading memory through the mount that shows it, beside a file of
// go-fuse alone with the same memory, options and read-ahead, and a file of tmpfs, in
// turns; none of it is in the page cache, but tmpfs is nothing else.
//
// sequential: from beginning to end, by read(2) of 1 MiB and by touching each page of
// a mapping: mem is memory of the server, file one that it holds as a pager does, remote
// the memory of a source, over TCP. fault: touches at random with MADV_RANDOM, of memory that the server has,
// and of memory that its fetcher asks a source for over TCP, as it does for a file that
// the process has mapped; beside what that fetcher alone takes for a page.
func BenchmarkShown(b *testing.B) { runAll(b, shownList) }

func shownList(scale) []benchmark {
	return []benchmark{{"sequential", shownSequential}, {"fault", shownFault}}
}

// start starts a process that serves memory until the end of the benchmark.
func (m *meter) start(c shownConfig) *shown {
	m.Helper()
	c.Size = m.shown
	if c.What != shownSource {
		c.Dir = m.TempDir()
	}
	s, err := startShown(c)
	m.must(err)
	m.closing(s.Close)
	s.dir = c.Dir
	return s
}

// startRemote starts one whose memory a source has, and the source.
func (m *meter) startRemote() *shown {
	m.Helper()
	key := tcp.NewKey()
	remote := m.start(shownConfig{What: shownRemote, Key: key})
	m.start(shownConfig{What: shownSource, Key: key, Address: strings.TrimPrefix(remote.ready, "ready ")})
	return remote
}

// open opens a file of m.shown bytes.
func (m *meter) open(path string) view {
	m.Helper()
	f, err := os.Open(path)
	m.must(err)
	m.closing(f.Close)
	return view{f, m.shown}
}

func (m *meter) tmpfs() view {
	m.Helper()
	f, err := os.CreateTemp("/dev/shm", "pageferry-bench")
	m.must(err)
	m.closing(func() error { return os.Remove(f.Name()) })
	_, err = io.CopyN(f, rand.Reader, int64(m.shown))
	m.must(err)
	m.must(f.Close())
	return m.open(f.Name())
}

func shownSequential(m *meter) {
	testutil.Require(m.TB, testutil.FUSE, testutil.Memory(6*uint64(m.shown)))
	here, bare, remote := m.start(shownConfig{What: shownHere}), m.start(shownConfig{What: shownBare}), m.startRemote()
	names := []string{"mem", "gofuse", "file", "tmpfs", "remote"}
	views := []view{m.open(filepath.Join(here.dir, "mem")), m.open(filepath.Join(bare.dir, "mem")), m.open(filepath.Join(here.dir, "map/0")), m.tmpfs(), m.open(filepath.Join(remote.dir, "mem"))}
	rates := map[string][]float64{}
	buf := make([]byte, min(m.shown, 1<<20))
	for turn := 0; m.loop(); turn++ {
		for i := range views {
			i = (i + turn) % len(views) // nobody is always first
			v := views[i]
			took, err := v.read(buf)
			m.must(err)
			rates["read-"+names[i]] = append(rates["read-"+names[i]], Rate(float64(v.size), took))
			took, err = v.touch()
			m.must(err)
			rates["touch-"+names[i]] = append(rates["touch-"+names[i]], Rate(float64(v.size), took))
		}
	}
	for _, how := range []string{"read", "touch"} {
		for _, n := range names {
			m.report(Median(rates[how+"-"+n]), how+"-"+n+"-GiB/s")
		}
		// Of each turn: they were measured one right after the other.
		toBare := func(n string) float64 {
			var ratios []float64
			for i, r := range rates[how+"-"+n] {
				ratios = append(ratios, r/rates[how+"-gofuse"][i])
			}
			m.report(Median(ratios), how+"-"+n+"/gofuse")
			return Median(ratios)
		}
		mem, file := toBare("mem"), toBare("file")
		m.judge(Row{What: "shown memory, sequential " + how, Target: 2, Got: Median(rates[how+"-mem"]), Unit: "GiB/s", AtLeast: true})
		m.judge(Row{What: "shown memory, sequential " + how + " to go-fuse alone", Target: 0.9, Got: mem, AtLeast: true,
			Of: fmt.Sprintf("%.2f / %.2f GiB/s, tmpfs %.2f", Median(rates[how+"-mem"]), Median(rates[how+"-gofuse"]), Median(rates[how+"-tmpfs"]))})
		m.judge(Row{What: "shown file that is held, sequential " + how + " to go-fuse alone", Target: 0.9, Got: file, AtLeast: true,
			Of: fmt.Sprintf("%.2f / %.2f GiB/s", Median(rates[how+"-file"]), Median(rates[how+"-gofuse"]))})
	}
}

func shownFault(m *meter) {
	testutil.Require(m.TB, testutil.FUSE, testutil.Memory(6*uint64(m.shown)))
	remote := m.startRemote()
	here, bare := m.start(shownConfig{What: shownHere}), m.start(shownConfig{What: shownBare})
	names := []string{"here", "gofuse", "tmpfs", "remote", "remote-mem"}
	views := []view{m.open(filepath.Join(here.dir, "map/0")), m.open(filepath.Join(bare.dir, "mem")), m.tmpfs(),
		m.open(filepath.Join(remote.dir, "map/0")), m.open(filepath.Join(remote.dir, "mem"))}
	p50 := map[string][]float64{}
	var ratios []float64
	for m.loop() {
		for i, v := range views {
			took, err := v.faults(m.touches)
			m.must(err)
			p50[names[i]] = append(p50[names[i]], US(took))
		}
		took, err := remote.fetch(m.touches)
		m.must(err)
		p50["fetch"] = append(p50["fetch"], US(took))
		last := len(ratios)
		ratios = append(ratios, (p50["remote"][last]-p50["here"][last])/p50["fetch"][last])
	}
	for _, n := range append(names, "fetch") {
		m.report(Median(p50[n]), n+"-p50-us")
	}
	m.report(max(0, Median(ratios)), "(remote-here)/fetch")
	m.judge(Row{What: "shown memory, random fault on a page that is here, p50", Target: 45, Got: Median(p50["here"]), Unit: "us",
		Of: fmt.Sprintf("go-fuse alone %.1f us", Median(p50["gofuse"]))})
	m.judge(Row{What: "shown memory, what a remote page takes more, p50 to a page fetched", Target: 1.2, Got: Median(ratios),
		Of: fmt.Sprintf("(%.1f - %.1f us) / %.1f us", Median(p50["remote"]), Median(p50["here"]), Median(p50["fetch"]))})
}
