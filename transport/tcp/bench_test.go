package tcp

import (
	"errors"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

const bulkPayload = 256 << 10

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

func lanePair(b *testing.B, kind transport.Kind, src, dst Config) (x, y transport.Lane, poolX, poolY *transport.Pool) {
	pool := func() *transport.Pool {
		p, err := transport.NewPool(8, bulkPayload)
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

// BenchmarkThroughput sends payloads of 256 KiB one way. raw is what Go's
// sockets do with the same bytes in the same run.
func BenchmarkThroughput(b *testing.B) {
	b.Run("raw", func(b *testing.B) {
		x, y := rawPair(b)
		b.SetBytes(bulkPayload)
		done := make(chan error, 1)
		go func() {
			buf := make([]byte, bulkPayload)
			for range b.N {
				if _, err := io.ReadFull(y, buf); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		buf := make([]byte, bulkPayload)
		b.ResetTimer()
		for range b.N {
			if _, err := x.Write(buf); err != nil {
				b.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	})
	lane := func(src, dst Config) func(b *testing.B) {
		return func(b *testing.B) {
			x, y, poolX, _ := lanePair(b, transport.Bulk, src, dst)
			b.SetBytes(bulkPayload)
			done := make(chan error, 1)
			go func() {
				for range b.N {
					f, err := y.Recv()
					if err != nil {
						done <- err
						return
					}
					f.Payload.Release()
				}
				done <- nil
			}()
			meta := make([]byte, wire.PagesSize(1, bulkPayload/page.Size))
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if err := x.Send(transport.Frame{Type: wire.TypePages, Meta: meta, Payload: poolX.Get(bulkPayload, nil)}); err != nil {
					b.Fatal(err)
				}
			}
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
	}
	plain := Config{Insecure: true}
	b.Run("plain", lane(plain, plain))
	wide := Config{Insecure: true, BulkBuffer: -1}
	b.Run("plain-autotuned", lane(wide, wide))
	a := newAuthority(b)
	b.Run("tls", lane(a.config(b, "source"), a.config(b, "dest")))
}

// BenchmarkPingPong asks for one page and waits for it, as a demand fault does.
// raw is read(2) and write(2) on blocking sockets with the same bytes.
func BenchmarkPingPong(b *testing.B) {
	want := wire.AppendWant(nil, wire.Want{ID: 1, Runs: []wire.Run{{Count: 1, First: 5}}})
	pages := wire.AppendPages(nil, wire.Pages{ID: 1, Runs: []wire.Run{{Kind: wire.RunData, Count: 1, First: 5}}, Sums: []uint32{1}})
	ask, answer := wire.HeaderSize+len(want), wire.HeaderSize+len(pages)+page.Size
	b.Run("raw", func(b *testing.B) {
		x, y := rawPair(b)
		var fd [2]int
		for i, c := range []*net.TCPConn{x, y} {
			var err error
			if fd[i], err = own(c); err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd[i])
			if err := unix.SetNonblock(fd[i], false); err != nil {
				b.Fatal(err)
			}
		}
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
		done := make(chan error, 1)
		go func() {
			in, out := make([]byte, ask), make([]byte, answer)
			for range b.N {
				err := full(fd[1], in)
				if err == nil {
					_, err = unix.Write(fd[1], out)
				}
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		out, in := make([]byte, ask), make([]byte, answer)
		b.ResetTimer()
		for range b.N {
			if _, err := unix.Write(fd[0], out); err != nil {
				b.Fatal(err)
			}
			if err := full(fd[0], in); err != nil {
				b.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	})
	lane := func(src, dst Config) func(b *testing.B) {
		return func(b *testing.B) {
			x, y, _, poolY := lanePair(b, transport.Urgent, src, dst)
			done := make(chan error, 1)
			go func() {
				for range b.N {
					_, err := y.Recv()
					if err == nil {
						err = y.Send(transport.Frame{Type: wire.TypePages, Meta: pages, Payload: poolY.Get(page.Size, nil)})
					}
					if err != nil {
						done <- err
						return
					}
				}
				done <- nil
			}()
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if err := x.Send(transport.Frame{Type: wire.TypeWant, Meta: want}); err != nil {
					b.Fatal(err)
				}
				f, err := x.Recv()
				if err != nil {
					b.Fatal(err)
				}
				f.Payload.Release()
			}
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
	}
	plain := Config{Insecure: true}
	b.Run("plain", lane(plain, plain))
	a := newAuthority(b)
	b.Run("tls", lane(a.config(b, "source"), a.config(b, "dest")))
}
