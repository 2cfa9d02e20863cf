package transporttest

import (
	"fmt"
	"io"
	"net"
	"sort"
	"sync"
	"time"
)

// Direction of bytes through a Proxy.
type Direction int

const (
	ToServer Direction = iota // from who dialed the proxy
	ToClient
)

// Action is what a Fault does.
type Action int

const (
	Cut   Action = iota // reset both connections
	End                 // end both connections in an orderly way
	Stall               // pass nothing more this way; the connections stay up
	Flip                // flip the bits of Mask in one byte
	Drop                // leave out N bytes
	Delay               // wait for Wait, then go on
)

// Fault is done to one direction of a connection when byte At (from 0) is about
// to pass.
type Fault struct {
	Dir  Direction
	At   int64
	Do   Action
	Mask byte          // of Flip; 0 means 1
	N    int64         // of Drop; 0 means 1
	Wait time.Duration // of Delay
}

// Plan says what is to happen to the n-th connection (from 0), given the first
// bytes that came from its client, which hold a preamble if they are of ours.
type Plan func(n int, first []byte) []Fault

// Proxy passes TCP connections on to a server and does to them what it is told.
// Close ends it, its connections and its goroutines.
type Proxy struct {
	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu     sync.Mutex
	plan   Plan
	conns  []*Conn
	reject bool
	closed bool
}

// NewProxy listens on a free port of 127.0.0.1 for connections to target.
func NewProxy(target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	p := &Proxy{ln: ln, target: target}
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is where the proxy listens.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// SetPlan sets what happens to connections that come from now on.
func (p *Proxy) SetPlan(plan Plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan = plan
}

// Reject makes new connections fail, as on a link that is down, or not.
func (p *Proxy) Reject(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reject = on
}

// Conns are all connections so far, in the order they came, ended ones too.
func (p *Proxy) Conns() []*Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*Conn(nil), p.conns...)
}

// CutAll, StallAll and ResumeAll do to every connection what Conn's methods do
// to one.
func (p *Proxy) CutAll() {
	for _, c := range p.Conns() {
		c.Cut()
	}
}

func (p *Proxy) StallAll() {
	for _, c := range p.Conns() {
		c.Stall()
	}
}

func (p *Proxy) ResumeAll() {
	for _, c := range p.Conns() {
		c.Resume()
	}
}

// Close cuts everything. Idempotent.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.ln.Close()
	p.CutAll()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		in, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.closed || p.reject {
			p.mu.Unlock()
			reset(in)
			continue
		}
		c := &Conn{n: len(p.conns), plan: p.plan, in: in, done: make(chan struct{})}
		c.cond = sync.NewCond(&c.mu)
		p.conns = append(p.conns, c)
		p.mu.Unlock()
		p.wg.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) serve(c *Conn) {
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		c.Cut()
		return
	}
	c.mu.Lock()
	c.out = out
	over := c.over
	c.mu.Unlock()
	if over {
		reset(out)
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { c.pump(ToServer, c.in, out) })
	wg.Go(func() { c.pump(ToClient, out, c.in) })
	wg.Wait()
	c.end(false)
}

// Conn is one connection through a Proxy.
type Conn struct {
	n    int
	plan Plan
	in   net.Conn
	done chan struct{} // closed when it is over

	mu      sync.Mutex
	cond    *sync.Cond
	out     net.Conn
	first   []byte
	faults  []Fault
	planned bool
	stalled [2]bool
	over    bool
	passed  [2]int64
}

// First is what came first from the client.
func (c *Conn) First() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]byte(nil), c.first...)
}

// Bytes is how many have passed in direction d.
func (c *Conn) Bytes(d Direction) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.passed[d]
}

// Cut resets both ends. End ends them in an orderly way.
func (c *Conn) Cut() { c.end(true) }
func (c *Conn) End() { c.end(false) }

// Stall lets nothing more through, in either direction, until Resume.
func (c *Conn) Stall()  { c.setStalled(true, ToServer, ToClient) }
func (c *Conn) Resume() { c.setStalled(false, ToServer, ToClient) }

func (c *Conn) setStalled(on bool, ds ...Direction) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range ds {
		c.stalled[d] = on
	}
	c.cond.Broadcast()
}

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

func (c *Conn) end(hard bool) {
	c.mu.Lock()
	if c.over {
		c.mu.Unlock()
		return
	}
	c.over = true
	out := c.out
	c.cond.Broadcast()
	c.mu.Unlock()
	close(c.done)
	for _, x := range []net.Conn{c.in, out} {
		switch {
		case x == nil:
		case hard:
			reset(x)
		default:
			x.Close()
		}
	}
}

// pump passes bytes one way until an end of either connection.
func (c *Conn) pump(d Direction, from, to net.Conn) {
	buf := make([]byte, 32<<10)
	var at int64
	for {
		n, err := from.Read(buf)
		if n > 0 && !c.pass(d, to, buf[:n], &at) {
			return
		}
		if err != nil {
			if err != io.EOF {
				c.Cut()
			} else if t, ok := to.(*net.TCPConn); ok {
				t.CloseWrite()
			}
			return
		}
	}
}

// pass writes b, which begins at byte *at, with whatever faults lie in it. It
// returns false when the connection is over.
func (c *Conn) pass(d Direction, to net.Conn, b []byte, at *int64) bool {
	for len(b) > 0 {
		f, ok := c.next(d, b, *at)
		k := int64(len(b))
		if ok {
			k = f.At - *at
		}
		if k > 0 {
			if !c.wait(d) {
				return false
			}
			if _, err := to.Write(b[:k]); err != nil {
				c.Cut()
				return false
			}
			c.mu.Lock()
			c.passed[d] += k
			c.mu.Unlock()
			*at += k
			b = b[k:]
		}
		if ok && !c.do(f, &b, at) {
			return false
		}
	}
	return true
}

// next takes the first fault that lies within b.
func (c *Conn) next(d Direction, b []byte, at int64) (Fault, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d == ToServer && !c.planned {
		c.planned = true
		c.first = append([]byte(nil), b...)
		if c.plan != nil {
			c.faults = append([]Fault(nil), c.plan(c.n, c.first)...)
			sort.SliceStable(c.faults, func(i, j int) bool { return c.faults[i].At < c.faults[j].At })
		}
	}
	for i, f := range c.faults {
		if f.Dir == d && f.At >= at && f.At < at+int64(len(b)) {
			c.faults = append(c.faults[:i], c.faults[i+1:]...)
			return f, true
		}
	}
	return Fault{}, false
}

func (c *Conn) wait(d Direction) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.stalled[d] && !c.over {
		c.cond.Wait()
	}
	return !c.over
}

func (c *Conn) do(f Fault, b *[]byte, at *int64) bool {
	switch f.Do {
	case Cut:
		c.Cut()
		return false
	case End:
		c.End()
		return false
	case Stall:
		c.setStalled(true, f.Dir)
	case Flip:
		(*b)[0] ^= max(f.Mask, 1)
	case Drop:
		// What is left of it lies in the bytes to come.
		n := min(max(f.N, 1), int64(len(*b)))
		*b = (*b)[n:]
		*at += n
		if rest := max(f.N, 1) - n; rest > 0 {
			c.mu.Lock()
			c.faults = append([]Fault{{Dir: f.Dir, At: *at, Do: Drop, N: rest}}, c.faults...)
			c.mu.Unlock()
		}
	case Delay:
		select {
		case <-time.After(f.Wait):
		case <-c.done:
			return false
		}
	}
	return true
}
