package dirty_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const gib = 1 << 30

// BenchmarkTrack measures, for 1 GiB of small pages: arming (the first look), the
// looks after nothing, 1 %, 10 % and every second page was written, the last look,
// and Peek at half of the pages. Times are the processor's, so that they mean
// something on a busy host.
func BenchmarkTrack(b *testing.B) {
	for _, m := range methods(b) {
		b.Run(string(m), func(b *testing.B) {
			testutil.Require(b, testutil.Root, testutil.AMD64, can(m), testutil.Memory(3*gib))
			p := dirtytest.Start(b)
			a := p.Area("anon", gib/page.Size)
			p.Poke(a.Range, 1)
			tr := track(b, p, m)
			look := func() (dirty.Pages, time.Duration) {
				maps := p.Maps()
				at := cpu(b, os.Getpid())
				got, err := tr.Collect(maps)
				if err != nil {
					b.Fatal(err)
				}
				return got, cpu(b, os.Getpid()) - at
			}
			got, arm := look()
			send(b, p, tr, &got)
			b.Run("arm", func(b *testing.B) {
				b.ReportMetric(float64(arm.Microseconds())/1000, "arm-ms/GiB")
				b.ReportMetric(0, "ns/op")
			})
			for _, c := range []struct {
				name  string
				every int
			}{{"0%", 0}, {"1%", 100}, {"10%", 10}, {"half", 2}} {
				b.Run(c.name, func(b *testing.B) {
					var sum time.Duration
					var wrote uint64
					for range b.N {
						if c.every != 0 {
							p.Poke(a.Range, c.every)
						}
						got, d := look()
						send(b, p, tr, &got)
						sum += d
						wrote = got.Written.BytesIn(a.Range) >> page.Shift
					}
					b.ReportMetric(float64(sum.Microseconds())/1000/float64(b.N), "scan-ms/GiB")
					b.ReportMetric(float64(wrote), "pages")
					b.ReportMetric(0, "ns/op")
				})
			}
			if m != dirty.WPAsync {
				return
			}
			b.Run("last", func(b *testing.B) {
				p.Poke(a.Range, 100)
				maps := p.Maps()
				at := cpu(b, os.Getpid())
				for range b.N {
					if _, err := tr.Last(maps); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64((cpu(b, os.Getpid())-at).Microseconds())/1000/float64(b.N), "scan-ms/GiB")
				b.ReportMetric(0, "ns/op")
			})
			b.Run("peek", func(b *testing.B) {
				var half page.Set
				for at := a.Start; at < a.End; at += 2 * page.Size {
					half.Add(page.PageOf(at))
				}
				p.Poke(a.Range, 10)
				at := cpu(b, os.Getpid())
				for range b.N {
					if _, err := tr.Peek(&half); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64((cpu(b, os.Getpid())-at).Microseconds())/1000/float64(b.N), "peek-ms/GiB")
				b.ReportMetric(0, "ns/op")
			})
		})
	}
}

// send tells a tracker that compares what was sent.
func send(b *testing.B, p *dirtytest.Program, tr dirty.Tracker, got *dirty.Pages) {
	if tr.Method() == dirty.Hash {
		s := dirtytest.NewShadow(b, p.Pid(), tr)
		s.Send(got)
	}
}

// BenchmarkSmallMappings is a look at 20 000 mappings of one page each.
func BenchmarkSmallMappings(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	p := dirtytest.Start(b)
	a := p.Area("anon", 40000)
	p.Poke(a.Range, 1)
	// Every second page is made read-only, so that each is a mapping.
	p.Do("stripes %x 40000", uint64(a.Start))
	tr := track(b, p, dirty.WPAsync)
	maps := p.Maps()
	at := cpu(b, os.Getpid())
	if _, err := tr.Collect(maps); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64((cpu(b, os.Getpid())-at).Microseconds())/1000, "arm-ms")
	b.ReportMetric(float64(len(maps)), "mappings")
	at = cpu(b, os.Getpid())
	for range b.N {
		if _, err := tr.Collect(maps); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpu(b, os.Getpid())-at).Microseconds())/1000/float64(b.N), "scan-ms")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkFirstWrite is what a write costs the program: the first one to a page
// after a look, and any other.
func BenchmarkFirstWrite(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	for _, tracked := range []bool{false, true} {
		b.Run(fmt.Sprintf("tracked=%v", tracked), func(b *testing.B) {
			p := dirtytest.Start(b)
			const n = 64 << 20 / page.Size
			a := p.Area("anon", n)
			p.Poke(a.Range, 1)
			var tr dirty.Tracker
			if tracked {
				tr = track(b, p, dirty.WPAsync)
			}
			var sum time.Duration
			for range b.N {
				if tracked {
					if _, err := tr.Collect(p.Maps()); err != nil {
						b.Fatal(err)
					}
				}
				before := cpu(b, p.Pid())
				p.Poke(a.Range, 1)
				sum += cpu(b, p.Pid()) - before
			}
			b.ReportMetric(float64(sum.Nanoseconds())/float64(b.N)/n, "ns/page")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// cpu is the processor time that a process has used (clock_getcpuclockid(3)).
func cpu(b *testing.B, pid int) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
