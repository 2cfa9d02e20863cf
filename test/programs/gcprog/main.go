// Gcprog is a Go program that checks itself: garbage collection under pressure,
// goroutines, channels, maps, timers, signals to itself, a pipe through the
// runtime's poller. It is silent while all is well; at the first violation it
// says what is wrong and exits with 1; on SIGTERM it verifies everything once
// more, says "ok" and exits with 0.
package main

import (
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	live    = flag.Int("live", 32, "MiB of data that are live")
	garbage = flag.Int("garbage", 40, "MiB of garbage per second")
	workers = flag.Int("workers", 4, "goroutines of each kind")
	beatTo  = flag.String("heartbeat", "", "unix:PATH or udp:HOST:PORT")
	id      = flag.String("identity", "gcprog", "identity in heartbeats")
	report  = flag.String("report", "", "file for the outcome")
	beatMS  = flag.Int("beat-ms", 5, "milliseconds between heartbeats")
)

var stop = make(chan struct{})

func main() {
	flag.Parse()
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)

	b := newBeater(*beatTo, *id)
	var wg sync.WaitGroup
	run := func(f func()) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f()
		}()
	}
	run(b.run)
	t := grow(*live << 20)
	for i := range *workers {
		run(func() { allocate(*garbage << 20 / *workers) })
		run(func() { mapped(uint64(i) + 1) })
		run(func() { t.churn(uint64(i) + 1) })
	}
	run(pingPong)
	run(timers)
	run(signals)
	run(poller)
	run(func() { deep(b) })
	fmt.Println("ready")

	<-term
	close(stop)
	wg.Wait()
	t.verify()
	tell("ok")
	b.send("ok")
}

// bad reports a violation and ends the program.
func bad(format string, args ...any) {
	s := "bad " + fmt.Sprintf(format, args...)
	tell(s)
	theBeater.Load().send(s)
	os.Exit(1)
}

func tell(s string) {
	fmt.Println(s)
	if *report == "" {
		return
	}
	f, err := os.OpenFile(*report, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintln(f, s)
}

// nap sleeps and reports whether to go on.
func nap(d time.Duration) bool {
	select {
	case <-stop:
		return false
	case <-time.After(d):
		return true
	}
}

func stopped() bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}

// random is a small generator: each goroutine has its own.
type random uint64

func (r *random) next() uint64 {
	*r ^= *r << 13
	*r ^= *r >> 7
	*r ^= *r << 17
	return uint64(*r)
}

// node is live data with pointers in it: a tree that the collector walks.
type node struct {
	left, right *node
	data        []byte
	sum         uint64
}

func newNode(r *random) *node {
	n := &node{data: make([]byte, 64+r.next()%1024)}
	n.fill(r)
	return n
}

func (n *node) fill(r *random) {
	v := r.next()
	for i := range n.data {
		n.data[i] = byte(v >> (i % 57))
	}
	n.sum = hash(n.data)
}

func hash(b []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(b)
	return h.Sum64()
}

func (n *node) check() {
	if hash(n.data) != n.sum {
		bad("a node of the tree changed")
	}
}

// tree is the live data; branches are guarded one by one.
type tree struct {
	branches []branch
}

type branch struct {
	mu   sync.Mutex
	root *node
}

func grow(bytes int) *tree {
	t := &tree{branches: make([]branch, 256)}
	r := random(42)
	for size := 0; size < bytes; {
		n := newNode(&r)
		size += len(n.data) + 100
		b := &t.branches[r.next()%256]
		n.left, b.root = b.root, n
		if n.left != nil && r.next()%2 == 0 {
			n.left, n.right = n.left.left, n.left
			n.right.left = nil
		}
	}
	return t
}

func (t *tree) churn(seed uint64) {
	r := random(seed)
	for nap(2 * time.Millisecond) {
		b := &t.branches[r.next()%256]
		b.mu.Lock()
		for n := b.root; n != nil; n = n.left {
			if r.next()%16 == 0 {
				n.check()
				// New memory for old: the collector has something to do.
				n.data = make([]byte, 64+r.next()%1024)
				n.fill(&r)
			}
		}
		b.mu.Unlock()
	}
}

func (t *tree) verify() {
	for i := range t.branches {
		for n := t.branches[i].root; n != nil; n = n.left {
			n.check()
			if n.right != nil {
				n.right.check()
			}
		}
	}
}

// allocate makes garbage at a rate.
func allocate(perSecond int) {
	var keep [16][]uint64
	for i := uint64(0); nap(10 * time.Millisecond); i++ {
		for size := 0; size < perSecond/100; {
			b := make([]uint64, 1+(i*7919+uint64(size))%2048)
			for j := range b {
				b[j] = i + uint64(j)
			}
			size += len(b) * 8
			k := (i + uint64(size)) % 16
			for j, v := range keep[k] {
				if v != keep[k][0]+uint64(j) {
					bad("allocated memory changed")
				}
			}
			keep[k] = b
		}
	}
	runtime.KeepAlive(keep)
}

// mapped keeps a map and verifies it against what it must hold.
func mapped(seed uint64) {
	r := random(seed)
	m := map[uint64]string{}
	for nap(3 * time.Millisecond) {
		for range 50 {
			k := r.next() % 5000
			if s, ok := m[k]; ok && s != fmt.Sprint(k*seed) {
				bad("map entry %d holds %q", k, s)
			}
			if r.next()%4 == 0 {
				delete(m, k)
			} else {
				m[k] = fmt.Sprint(k * seed)
			}
		}
	}
}

// pingPong passes a number round a ring of goroutines.
func pingPong() {
	const n = 20
	var ring [n]chan uint64
	for i := range ring {
		ring[i] = make(chan uint64)
	}
	for i := 1; i < n; i++ {
		go func() {
			for v := range ring[i-1] {
				ring[i] <- v + 1
			}
			close(ring[i])
		}()
	}
	for v := uint64(0); nap(5 * time.Millisecond); v += n {
		ring[0] <- v
		if got := <-ring[n-1]; got != v+n-1 {
			bad("the ring returned %d, not %d", got, v+n-1)
		}
	}
	close(ring[0])
	<-ring[n-1]
}

// timers checks that a ticker goes on and that time does not go back.
func timers() {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	last := time.Now()
	for !stopped() {
		select {
		case <-tick.C:
		case <-time.After(60 * time.Second):
			bad("a ticker stopped")
		}
		now := time.Now()
		if now.Before(last) {
			bad("the monotonic clock went back by %v", last.Sub(now))
		}
		last = now
	}
}

// signals sends itself signals and waits for each.
func signals() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	for nap(20 * time.Millisecond) {
		if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
			bad("kill: %v", err)
		}
		select {
		case <-c:
		case <-time.After(60 * time.Second):
			bad("a signal to itself did not arrive")
		}
	}
}

// poller sends numbers through a pipe that the runtime's poller waits for.
func poller() {
	r, w, err := os.Pipe()
	if err != nil {
		bad("pipe: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [1]byte
		for want := byte(0); ; want++ {
			if n, err := r.Read(b[:]); n == 0 || err != nil {
				return
			}
			if b[0] != want {
				bad("%d came out of a pipe, not %d", b[0], want)
			}
		}
	}()
	for v := byte(0); nap(5 * time.Millisecond); v++ {
		if _, err := w.Write([]byte{v}); err != nil {
			bad("write to a pipe: %v", err)
		}
	}
	w.Close()
	<-done
	r.Close()
}

// deep makes stacks grow and shrink, which moves them.
func deep(*beater) {
	for d := 1; nap(7 * time.Millisecond); d = d*5%3001 + 1 {
		done := make(chan int)
		go func() { done <- recurse(d, [8]int{d}) }()
		if got := <-done; got != d*(d+1)/2 {
			bad("recursion of depth %d returned %d", d, got)
		}
	}
}

func recurse(n int, frame [8]int) int {
	if n == 0 {
		return 0
	}
	frame[n%8] = n
	return recurse(n-1, frame) + frame[n%8]
}

var theBeater atomic.Pointer[beater]
