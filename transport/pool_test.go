package transport

import (
	"sync"
	"testing"
	"time"
)

func TestPool(t *testing.T) {
	p, err := NewPool(3, 8192)
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := p.Get(1, nil), p.Get(8192, nil), p.Get(0, nil)
	if a.Len() != 1 || len(b.Bytes()) != 8192 || c.Len() != 0 || c.Cap() != 8192 || p.Outstanding() != 3 {
		t.Fatalf("lengths %d %d %d, %d out", a.Len(), b.Len(), c.Len(), p.Outstanding())
	}
	a.SetLen(8192)
	a.Bytes()[8191] = 1
	b.Bytes()[0] = 2
	if a.Bytes()[8191] != 1 || len(append(a.Bytes(), 9)) == 0 || b.Bytes()[0] == 9 {
		t.Error("buffers share memory")
	}
	done := make(chan struct{})
	time.AfterFunc(10*time.Millisecond, func() { close(done) })
	if x := p.Get(1, done); x != nil {
		t.Error("a fourth buffer came out of three")
	}
	if err := p.Close(); err == nil {
		t.Error("closed with buffers out")
	}
	got := make(chan *Buffer)
	go func() { got <- p.Get(5, nil) }()
	b.Release()
	if x := <-got; x != b || x.Len() != 5 {
		t.Error("the buffer released is not the one that was waited for")
	}
	a.Release()
	b.Release()
	c.Release()
	(*Buffer)(nil).Release()
	if x := p.Get(1, nil); x != c {
		t.Error("the last buffer in is not the first out")
	}
	c.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if err := p.Close(); err == nil {
		t.Error("closed twice")
	}
	for _, bad := range [][2]int{{0, 4096}, {1, 0}, {1, 100}} {
		if _, err := NewPool(bad[0], bad[1]); err == nil {
			t.Errorf("pool of %d buffers of %d bytes", bad[0], bad[1])
		}
	}
}

func TestPoolRace(t *testing.T) {
	p, err := NewPool(4, 4096)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 2000 {
				b := p.Get(8, nil)
				b.Bytes()[0] = byte(i)
				if b.Bytes()[0] != byte(i) {
					t.Error("one buffer was given to two")
				}
				b.Release()
			}
		})
	}
	wg.Wait()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
