package tcp

import (
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// A contestant moves n units of work from one end of a connection to the other
// and returns when the last has arrived.
type contestant struct {
	name string
	run  func(n int) error
}

// contest lets all of them move the same in turns too short for the machine to
// change in between, and reports the median of each. The first is the raw
// limit; the others' ratio to it is the result.
func contest(b *testing.B, bytes int64, perTurn int, cs []contestant) {
	for _, c := range cs { // windows open, caches warm
		if err := c.run(perTurn); err != nil {
			b.Fatal(c.name, err)
		}
	}
	took := make([][]float64, len(cs))
	b.ResetTimer()
	for range b.N {
		for i, c := range cs {
			start := time.Now()
			if err := c.run(perTurn); err != nil {
				b.Fatal(c.name, err)
			}
			took[i] = append(took[i], float64(time.Since(start).Nanoseconds())/float64(perTurn))
		}
	}
	b.ReportMetric(0, "ns/op")
	var raw float64
	for i, c := range cs {
		slices.Sort(took[i])
		m := took[i][len(took[i])/2]
		if bytes > 0 {
			b.ReportMetric(float64(bytes)/m*1e9/(1<<30), c.name+"-GiB/s")
		} else {
			b.ReportMetric(m/1000, c.name+"-us")
		}
		if i == 0 {
			raw = m
		} else {
			b.ReportMetric(raw/m, c.name+"/"+cs[0].name)
		}
	}
}

// server answers run requests: it does n units of work on its end.
func server(b *testing.B, unit func() error) (start chan<- int, done <-chan error) {
	in, out := make(chan int), make(chan error, 1)
	b.Cleanup(func() { close(in) })
	go func() {
		for n := range in {
			var err error
			for range n {
				if err = unit(); err != nil {
					break
				}
			}
			out <- err
		}
	}()
	return in, out
}

func duel(b *testing.B, name string, near, far func() error) contestant {
	start, done := server(b, far)
	return contestant{name, func(n int) error {
		start <- n
		for range n {
			if err := near(); err != nil {
				return err
			}
		}
		return <-done
	}}
}

// rawPair is a connection of Go's own over loopback, unadorned.
func rawPair(b *testing.B) (x, y *net.TCPConn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// blockingPair is the same as descriptors in blocking mode.
func blockingPair(b *testing.B) (fd [2]int) {
	x, y := rawPair(b)
	for i, c := range []*net.TCPConn{x, y} {
		var err error
		if fd[i], err = own(c); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { unix.Close(fd[i]) })
		if err := unix.SetNonblock(fd[i], false); err != nil {
			b.Fatal(err)
		}
	}
	return fd
}

func lanePair(b *testing.B, kind transport.Kind, src, dst Config) (x, y transport.Lane, poolX, poolY *transport.Pool) {
	pool := func() *transport.Pool {
		p, err := transport.NewPool(4, bulkPayload)
		if err != nil {
			b.Fatal(err)
		}
		return p
	}
	poolX, poolY = pool(), pool()
	l := newLink(b, src, dst)
	key, id := NewKey(), transport.LaneID{Kind: kind}
	x, y, e1, e2 := l.lane(id, key, key, poolX, poolY)
	if err := errors.Join(e1, e2); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		x.Close()
		y.Close()
		if err := errors.Join(poolX.Close(), poolY.Close()); err != nil {
			b.Error(err)
		}
	})
	return x, y, poolX, poolY
}

const bulkPayload = 256 << 10

// BenchmarkThroughput sends payloads of 256 KiB one way: through Go's sockets
// as they are, and through lanes.
func BenchmarkThroughput(b *testing.B) {
	x, y := rawPair(b)
	out, in := make([]byte, bulkPayload), make([]byte, bulkPayload)
	cs := []contestant{duel(b, "raw",
		func() error { _, err := x.Write(out); return err },
		func() error { _, err := io.ReadFull(y, in); return err })}
	lane := func(name string, src, dst Config) {
		x, y, pool, _ := lanePair(b, transport.Bulk, src, dst)
		meta := make([]byte, wire.PagesSize(1, bulkPayload/page.Size))
		cs = append(cs, duel(b, name,
			func() error {
				return x.Send(transport.Frame{Type: wire.TypePages, Meta: meta, Payload: pool.Get(bulkPayload, nil)})
			},
			func() error {
				f, err := y.Recv()
				f.Payload.Release()
				return err
			}))
	}
	plain, wide := Config{Insecure: true}, Config{Insecure: true, BulkBuffer: 1 << 20}
	a := newAuthority(b)
	lane("plain", plain, plain)
	lane("plain-1MiB", wide, wide)
	lane("tls", a.config(b, "source"), a.config(b, "dest"))
	contest(b, bulkPayload, 64, cs)
}

// BenchmarkPingPong asks for one page and waits for it, as a demand fault does:
// by read(2) and write(2) on blocking sockets with the same bytes, and on lanes.
func BenchmarkPingPong(b *testing.B) {
	want := wire.AppendWant(nil, wire.Want{ID: 1, Runs: []wire.Run{{Count: 1, First: 5}}})
	pages := wire.AppendPages(nil, wire.Pages{ID: 1, Runs: []wire.Run{{Kind: wire.RunData, Count: 1, First: 5}}, Sums: []uint32{1}})
	ask, answer := make([]byte, wire.HeaderSize+len(want)), make([]byte, wire.HeaderSize+len(pages)+page.Size)
	fd := blockingPair(b)
	full := func(fd int, p []byte) error {
		for len(p) > 0 {
			n, err := unix.Read(fd, p)
			if err != nil || n == 0 {
				return errors.Join(err, io.ErrUnexpectedEOF)
			}
			p = p[n:]
		}
		return nil
	}
	near, far := make([]byte, len(answer)), make([]byte, len(ask))
	cs := []contestant{duel(b, "raw",
		func() error {
			if _, err := unix.Write(fd[0], ask); err != nil {
				return err
			}
			return full(fd[0], near)
		},
		func() error {
			if err := full(fd[1], far); err != nil {
				return err
			}
			_, err := unix.Write(fd[1], answer)
			return err
		})}
	lane := func(name string, src, dst Config) {
		x, y, _, pool := lanePair(b, transport.Urgent, src, dst)
		cs = append(cs, duel(b, name,
			func() error {
				if err := x.Send(transport.Frame{Type: wire.TypeWant, Meta: want}); err != nil {
					return err
				}
				f, err := x.Recv()
				f.Payload.Release()
				return err
			},
			func() error {
				if _, err := y.Recv(); err != nil {
					return err
				}
				return y.Send(transport.Frame{Type: wire.TypePages, Meta: pages, Payload: pool.Get(page.Size, nil)})
			}))
	}
	plain := Config{Insecure: true}
	a := newAuthority(b)
	lane("plain", plain, plain)
	lane("tls", a.config(b, "source"), a.config(b, "dest"))
	contest(b, 0, 200, cs)
}
