package transport

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Pool is a bounded set of equal, page-aligned buffers outside the Go heap: the
// kernel and a network card may be given their addresses. Safe for concurrent
// use.
type Pool struct {
	mem  []byte
	size int
	once sync.Once

	// free holds a token for each buffer in stack, so that Get can wait for
	// one and for the end of its caller at once.
	free  chan struct{}
	mu    sync.Mutex
	stack []*Buffer // the last one released is in the caches still: it goes out first
}

// Buffer is registered memory from a pool, owned by whoever got it until
// Release.
type Buffer struct {
	pool *Pool
	full []byte
	n    int
}

// NewPool maps n buffers of size bytes each. Not inherited by fork, so that a
// keeper does not hold a second copy. Close unmaps them.
func NewPool(n, size int) (*Pool, error) {
	if n <= 0 || size <= 0 || size%4096 != 0 {
		return nil, fmt.Errorf("transport: pool of %d buffers of %d bytes: want whole pages", n, size)
	}
	mem, err := unix.Mmap(-1, 0, n*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("transport: map pool of %d bytes: %w", n*size, err)
	}
	_ = unix.Madvise(mem, unix.MADV_DONTFORK) // only saves memory
	p := &Pool{mem: mem, size: size, free: make(chan struct{}, n), stack: make([]*Buffer, 0, n)}
	for i := range n {
		p.put(&Buffer{pool: p, full: mem[i*size : (i+1)*size : (i+1)*size]})
	}
	return p, nil
}

// Get takes a buffer of n bytes, waiting until one is free. It returns nil when
// done is closed first; a nil done never is.
func (p *Pool) Get(n int, done <-chan struct{}) *Buffer {
	if n > p.size {
		panic(fmt.Sprintf("transport: buffer of %d bytes from a pool of %d", n, p.size))
	}
	select {
	case <-p.free:
	default:
		select {
		case <-p.free:
		case <-done:
			return nil
		}
	}
	p.mu.Lock()
	last := len(p.stack) - 1
	b := p.stack[last]
	p.stack = p.stack[:last]
	p.mu.Unlock()
	b.n = n
	return b
}

func (p *Pool) put(b *Buffer) {
	p.mu.Lock()
	p.stack = append(p.stack, b)
	p.mu.Unlock()
	p.free <- struct{}{}
}

// Buffers is how many there are, free or not.
func (p *Pool) Buffers() int { return cap(p.free) }

// BufferSize is the capacity of each buffer in bytes.
func (p *Pool) BufferSize() int { return p.size }

// Memory is all of the pool's memory, for registering it with a device: not to be
// read or written by way of it, and gone after Close.
func (p *Pool) Memory() []byte { return p.mem }

// Outstanding is how many buffers are not in the pool.
func (p *Pool) Outstanding() int { return cap(p.free) - len(p.free) }

// Close unmaps the memory. It fails, and unmaps nothing, while a buffer is out.
func (p *Pool) Close() (err error) {
	if n := p.Outstanding(); n != 0 {
		return fmt.Errorf("transport: pool closed with %d buffers outstanding", n)
	}
	err = errors.New("transport: pool closed twice")
	p.once.Do(func() { err = unix.Munmap(p.mem) })
	return err
}

// Bytes is the buffer's content, valid until Release.
func (b *Buffer) Bytes() []byte { return b.full[:b.n] }

// Len is its length in bytes, Cap the most it can hold, SetLen changes it.
func (b *Buffer) Len() int     { return b.n }
func (b *Buffer) Cap() int     { return len(b.full) }
func (b *Buffer) SetLen(n int) { b.n = n; _ = b.full[:n] }

// Pool is where the buffer comes from.
func (b *Buffer) Pool() *Pool { return b.pool }

// Release gives the buffer back. A nil buffer may be released.
func (b *Buffer) Release() {
	if b != nil {
		b.pool.put(b)
	}
}
