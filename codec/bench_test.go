package codec

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

func benchmarkEncoder(b *testing.B, cfg EncoderConfig, kind int) {
	const total, pages = 4096, 64 // beyond the caches, in frames of 256 KiB
	mem := pagesOf(newRand(b), kind, total)
	data := make([]byte, pages<<page.Shift)
	e := NewEncoder(cfg)
	e.SetRound(Round{Number: 1})
	var p wire.Pages
	var sent int
	b.SetBytes(int64(len(data)))
	var copying time.Duration
	at := 0
	for b.Loop() {
		t := time.Now()
		copy(data, mem[at<<page.Shift:])
		copying += time.Since(t)
		first := page.Num(at)
		sent += e.Encode(&p, 0, []page.Range{{Start: first.Addr(), End: (first + pages).Addr()}}, data)
		at = (at + pages) % total
	}
	b.ReportMetric(float64(b.N)*float64(len(data))/float64(sent), "ratio")
	b.ReportMetric((b.Elapsed()-copying).Seconds()/float64(b.N)*(1<<30)/float64(len(data)), "s/GiB")
}

func BenchmarkEncoderOff(b *testing.B) { benchmarkEncoder(b, EncoderConfig{}, 3) }
func BenchmarkEncoderAuto(b *testing.B) {
	for kind, k := range kinds {
		for _, rate := range []struct {
			name  string
			bytes float64
		}{{"1Gbit", 119e6}, {"10Gbit", 1190e6}, {"2.5GiB", 2.5 * (1 << 30)}} {
			b.Run(k.name+"/"+rate.name, func(b *testing.B) {
				c := &Chooser{}
				c.SetRate(rate.bytes)
				benchmarkEncoder(b, EncoderConfig{Chooser: c}, kind)
			})
		}
	}
}

func BenchmarkEncoderTwins(b *testing.B) {
	benchmarkEncoder(b, EncoderConfig{Twins: NewTwins(TwinsConfig{Bytes: 4096 * twinSize / 2})}, 3)
}

// What mark did before there was an encoder.
func BenchmarkEncoderBefore(b *testing.B) {
	const total, pages = 4096, 64
	mem := pagesOf(newRand(b), 3, total)
	data := make([]byte, pages<<page.Shift)
	b.SetBytes(int64(len(data)))
	var p wire.Pages
	var copying time.Duration
	at := 0
	for b.Loop() {
		t := time.Now()
		copy(data, mem[at<<page.Shift:])
		copying += time.Since(t)
		p.Runs, p.Sums = p.Runs[:0], p.Sums[:0]
		keep, off := 0, 0
		for first, end := page.Num(at), page.Num(at+pages); first < end; {
			left := data[off : off+int((end-first)<<page.Shift)]
			zero, n := Run(left)
			run := wire.Run{Kind: wire.RunZero, Count: uint32(n), First: first}
			if !zero {
				run.Kind = wire.RunData
				d := left[:n<<page.Shift]
				if keep != off {
					copy(data[keep:], d)
				}
				p.Sums = AppendSums(p.Sums, data[keep:keep+len(d)])
				keep += len(d)
			}
			p.Runs = append(p.Runs, run)
			first += page.Num(n)
			off += n << page.Shift
		}
		at = (at + pages) % total
	}
	b.ReportMetric((b.Elapsed()-copying).Seconds()/float64(b.N)*(1<<30)/float64(len(data)), "s/GiB")
}

// Twins at their dearest: one page in 32 repeats, so all are looked at.
func BenchmarkEncoderTwinsHits(b *testing.B) {
	const total, pages = 4096, 64
	r := newRand(b)
	mem := pagesOf(r, 3, total)
	for i := 0; i < total; i += 16 {
		copy(mem[i<<page.Shift:(i+1)<<page.Shift], mem)
	}
	data := make([]byte, pages<<page.Shift)
	e := NewEncoder(EncoderConfig{Twins: NewTwins(TwinsConfig{})})
	var p wire.Pages
	b.SetBytes(int64(len(data)))
	at := 0
	for b.Loop() {
		copy(data, mem[at<<page.Shift:])
		first := page.Num(at)
		if at == 0 {
			e.cfg.Twins.Reset()
		}
		e.SetRound(Round{Number: 1})
		e.Encode(&p, 0, []page.Range{{Start: first.Addr(), End: (first + pages).Addr()}}, data)
		at = (at + pages) % total
	}
}

// A page that is exchanged for one that differs in eight words.
func BenchmarkSent(b *testing.B) {
	const total = 4096
	r := newRand(b)
	mem := pagesOf(r, 3, total)
	s := NewSent(SentConfig{Bytes: 2 * total * page.Size})
	buf := make([]byte, 0, page.Size)
	b.SetBytes(page.Size)
	i, round, used := 0, uint32(1), 0
	for b.Loop() {
		p := mem[i<<page.Shift : (i+1)<<page.Shift]
		for k := range 8 {
			p[k*512+int(round)%512]++
		}
		if _, ok := s.Exchange(buf, 0, page.Num(i), p, page.Size/2, Round{Number: round, Keep: true}); ok {
			used++
		}
		if i = (i + 1) % total; i == 0 {
			round++
		}
	}
	b.ReportMetric(float64(used)/float64(b.N), "used/page")
}
