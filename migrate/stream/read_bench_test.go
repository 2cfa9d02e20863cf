package stream

import (
	"fmt"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
)

// BenchmarkRead is what reading costs beside the lane itself: a page that a thread
// waits for, and 1 MiB as people read, four at once.
func BenchmarkRead(b *testing.B) {
	for _, c := range []struct {
		kind  transport.Kind
		prio  page.Priority
		bytes int
		par   int
	}{{transport.Urgent, page.Demand, page.Size, 1}, {transport.Bulk, page.Reader, page.Size, 1}, {transport.Bulk, page.Reader, 1 << 20, 4}} {
		b.Run(fmt.Sprintf("%v/%d", c.kind, c.bytes), func(b *testing.B) {
			st, err := pagestore.Create("bench")
			if err != nil {
				b.Fatal(err)
			}
			defer st.Close()
			server, err := NewServer(ServerConfig{Reader: same{}})
			if err != nil {
				b.Fatal(err)
			}
			pool, err := transport.NewPool(8, 256<<10)
			if err != nil {
				b.Fatal(err)
			}
			f := NewFetcher(FetcherConfig{Store: st})
			done := make(chan struct{}, 2)
			for i := range 2 {
				x, y := transporttest.NewPair(transport.LaneID{Kind: c.kind, Index: uint8(i)}, pool, nil)
				go func() { _ = server.Serve(b.Context(), y); done <- struct{}{} }()
				if err := f.Attach(x); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(int64(c.bytes))
			b.SetParallelism(c.par)
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, c.bytes)
				for pb.Next() {
					if err := f.Read(b.Context(), file, 7, buf, c.prio); err != nil {
						b.Error(err)
					}
				}
			})
			f.Close()
			<-done
			<-done
			if err := server.Close(); err != nil {
				b.Error(err)
			}
			if err := pool.Close(); err != nil {
				b.Error(err)
			}
		})
	}
}

// same reads pages that are not zero.
type same struct{}

func (same) ReadPages(_ page.Space, _ []page.Range, buf []byte) error {
	for i := 0; i < len(buf); i += 512 {
		buf[i] = 1
	}
	return nil
}
