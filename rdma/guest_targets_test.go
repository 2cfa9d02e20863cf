package rdma

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Targets, as ratios to perftest: at least so much of the throughput of the better
// of ib_read_bw and ib_write_bw with their defaults, at most so many times the
// typical latency of ib_read_lat.
const (
	bulkTarget    = 0.9
	latencyTarget = 1.3
)

const (
	bulkPiece = 64 << 10
	readPiece = 4 << 10
)

var guestOnly = testutil.Requirement{Name: "the guest (make bench-rdma)", Check: func() error {
	if !vmtest.Inside() {
		return errors.New("soft-RoCE devices are made for it, which are for a guest only")
	}
	return nil
}}

// figure is something that is measured once in every round.
type figure struct {
	name    string
	measure func(b *testing.B, amount int) float64
	values  []float64
}

// BenchmarkTargets measures lanes, one-sided reads and perftest in turn, b.N times,
// on the same two devices, first as they are and then with loss and delay, and
// prints a table of the ratios. make bench-rdma calls it.
func BenchmarkTargets(b *testing.B) {
	testutil.Require(b, guestOnly)
	a, z := vmtest.Pair(b)
	for _, d := range []vmtest.Device{a, z} {
		testutil.Eventually(b, 5*time.Second, func() error { _, err := Find(d.Addr); return err })
	}
	r := newRig(b)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, c := range []struct {
		name        string
		lossy       bool
		bulk, reads int // pieces in a round
	}{{"clean", false, 256, 500}, {"netem", true, 128, 100}} {
		b.Run(c.name, func(b *testing.B) {
			if c.lossy {
				impair(b, 1, time.Millisecond, a.Net, z.Net)
			}
			r.verify = c.lossy
			var bulk, reads []*figure
			for _, n := range []int{1, 2, 4} {
				bulk = append(bulk,
					&figure{name: fmt.Sprintf("%d lanes", n), measure: func(b *testing.B, amount int) float64 { return r.lanes(b, n, amount) }},
					&figure{name: fmt.Sprintf("ib_read_bw -q %d", n), measure: perftest("ib_read_bw", bulkPiece, n)},
					&figure{name: fmt.Sprintf("ib_write_bw -q %d", n), measure: perftest("ib_write_bw", bulkPiece, n)})
			}
			reads = append(reads,
				&figure{name: "ReadRemote", measure: r.reads},
				&figure{name: "ib_read_lat", measure: perftest("ib_read_lat", readPiece, 1)})
			for b.Loop() {
				for _, f := range bulk {
					f.values = append(f.values, f.measure(b, c.bulk))
				}
				for _, f := range reads {
					f.values = append(f.values, f.measure(b, c.reads))
				}
			}
			report(b, table, c.name, !c.lossy, bulk, reads)
		})
	}
	var u unix.Utsname
	_ = unix.Uname(&u) // else it is empty
	fmt.Printf("\nguest: Linux %s, %d processors, %s; software emulation: only ratios mean anything\n", unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), runtime.Version())
	fmt.Printf("clean: the cable as it is; netem: 1%% of the packets lost and 1 ms of delay at either end, content compared\n")
	fmt.Printf("targets are against the better of ib_read_bw and ib_write_bw with one queue pair, their default, and against ib_read_lat\n\n")
	table.Flush()
}

// report enters what bulk and reads have to say into the table. ratio is that of the
// medians, range that of single rounds. There are verdicts where there are targets.
func report(b *testing.B, w *tabwriter.Writer, name string, targets bool, bulk, reads []*figure) {
	better := func(read, write *figure) *figure {
		if mid(write.values) > mid(read.values) {
			return write
		}
		return read
	}
	line := func(what string, f, peer *figure, unit string, met func(ratio float64) bool) float64 {
		ratio := mid(f.values) / mid(peer.values)
		lo, hi := f.values[0]/peer.values[0], f.values[0]/peer.values[0]
		for i := range f.values {
			lo, hi = min(lo, f.values[i]/peer.values[i]), max(hi, f.values[i]/peer.values[i])
		}
		verdict := ""
		switch {
		case !targets || met == nil:
		case met(ratio):
			verdict = "met"
		default:
			verdict = "missed"
		}
		if !targets {
			what, _, _ = strings.Cut(what, " (")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%.1f %s\t%s\t%.1f %s\t%.2f\t%.2f-%.2f\t%s\n", name, what, f.name, mid(f.values), unit, peer.name, mid(peer.values), unit, ratio, lo, hi, verdict)
		return ratio
	}
	if targets {
		fmt.Fprintf(w, "network\tfigure\tours\tmedian\tperftest\tmedian\tratio\trange\ttarget\n")
	}
	atLeast := func(r float64) bool { return r >= bulkTarget }
	standard := better(bulk[1], bulk[2])
	for i := 0; i < len(bulk); i += 3 {
		ratio := line(fmt.Sprintf("64 KiB pieces (>= %.1f)", bulkTarget), bulk[i], standard, "MiB/s", atLeast)
		b.ReportMetric(ratio, fmt.Sprintf("bulk-%d-ratio", 1<<(i/3)))
		if i > 0 {
			line("64 KiB pieces, as many queue pairs", bulk[i], better(bulk[i+1], bulk[i+2]), "MiB/s", nil)
		}
	}
	ratio := line(fmt.Sprintf("4 KiB read (<= %.1f)", latencyTarget), reads[0], reads[1], "us", func(r float64) bool { return r <= latencyTarget })
	b.ReportMetric(ratio, "read-ratio")
}

// rig is the two devices and pools that lanes are made with.
type rig struct {
	from, to *Device
	src, dst *transport.Pool
	content  []byte // of every payload, but for its first bytes
	region   *Region
	mem      []byte
	verify   bool
}

func newRig(b *testing.B) *rig {
	r := &rig{src: newPool(b, 64, bulkPiece), dst: newPool(b, 64, bulkPiece), content: make([]byte, bulkPiece)}
	r.from, r.to = open(b, farAddr), open(b, nearAddr)
	r.mem, r.region = region(b, r.from, 1<<20)
	g := rand.NewChaCha8([32]byte{2})
	_, _ = g.Read(r.content)
	var all []*transport.Buffer
	for range r.src.Buffers() {
		p := r.src.Get(bulkPiece, nil)
		copy(p.Bytes(), r.content)
		all = append(all, p)
	}
	for _, p := range all {
		p.Release()
	}
	return r
}

// lanes sends n pieces over so many lanes and returns MiB per second.
func (r *rig) lanes(b *testing.B, lanes, n int) float64 {
	var xs, ys []*Lane
	for i := range lanes {
		id := bulkID
		id.Index = uint8(i)
		x, y := connected(b, id, Config{Device: r.from, Pool: r.src}, Config{Device: r.to, Pool: r.dst})
		xs, ys = append(xs, x), append(ys, y)
	}
	defer func() {
		for i := range lanes {
			xs[i].Close()
			ys[i].Close()
		}
	}()
	r.stream(b, xs, ys, 2) // pools are registered at the first use
	began := time.Now()
	r.stream(b, xs, ys, n/lanes)
	return float64(n*bulkPiece) / (1 << 20) / time.Since(began).Seconds()
}

// stream sends each pieces on every lane.
func (r *rig) stream(b *testing.B, xs, ys []*Lane, each int) {
	var wg sync.WaitGroup
	errs := make(chan error, 2*len(xs))
	meta := make([]byte, 100)
	for i := range xs {
		wg.Go(func() {
			for range each {
				if err := xs[i].Send(transport.Frame{Type: wire.TypePages, Meta: meta, Payload: r.src.Get(bulkPiece, xs[i].done)}); err != nil {
					errs <- err
					return
				}
			}
		})
		wg.Go(func() {
			for range each {
				f, err := ys[i].Recv()
				if err == nil && r.verify && !bytes.Equal(f.Payload.Bytes(), r.content) {
					err = errors.New("a payload differs")
				}
				f.Payload.Release()
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		b.Error(err)
	}
	if b.Failed() {
		b.FailNow()
	}
}

// reads is the median of n one-sided reads of one page in microseconds.
func (r *rig) reads(b *testing.B, n int) float64 {
	id := transport.LaneID{Migration: bulkID.Migration, Epoch: 1, Kind: transport.Urgent}
	x, y := connected(b, id, Config{Device: r.to, Pool: r.dst}, Config{Device: r.from, Pool: r.src})
	defer y.Close()
	defer x.Close()
	buf := r.dst.Get(readPiece, nil)
	defer buf.Release()
	var times []time.Duration
	for i := range n + 20 { // the first are for warming up
		at := 0 // perftest reads the same place again and again, too
		if r.verify {
			at = i % (len(r.mem) / readPiece) * readPiece
		}
		began := time.Now()
		if err := x.ReadRemote(b.Context(), r.region.Key(), r.region.Address()+uint64(at), buf); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(began))
		if r.verify && !bytes.Equal(buf.Bytes(), r.mem[at:at+readPiece]) {
			b.Fatalf("read %d differs", i)
		}
	}
	return median(times[20:])
}
