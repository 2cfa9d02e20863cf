package pager

import (
	"sync"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// aheadPages is how many pages around one that was demanded are put into the page
// cache: programs touch their memory in clusters. They arrive soon after it, and are
// put there when the next one of them is demanded.
const aheadPages = 16

// ahead puts pages of the image that are here into the page cache before the program
// asks for them.
type ahead struct {
	v     *veiled
	work  chan page.Num
	done  chan struct{}
	mu    sync.RWMutex // held for reading from looking at a page to its being stored
	buf   []byte
	stack map[page.Num]uint16 // by block: which of its pages were put
}

func newAhead(v *veiled) *ahead {
	a := &ahead{v: v, work: make(chan page.Num, 64), done: make(chan struct{}), buf: make([]byte, aheadPages<<page.Shift), stack: map[page.Num]uint16{}}
	go a.run()
	return a
}

// demanded tells that the program waits for page n. It never waits.
func (a *ahead) demanded(n page.Num) {
	select {
	case a.work <- n:
	default:
	}
}

// drain returns when nothing that was looked up before is still to be stored.
func (a *ahead) drain() {
	a.mu.Lock()
	a.mu.Unlock() //nolint:staticcheck // empty on purpose
}

func (a *ahead) close() { close(a.done) }

func (a *ahead) run() {
	for {
		select {
		case <-a.done:
			return
		case n := <-a.work:
			a.store(n)
		}
	}
}

// store puts those pages of n's block that are here and were not put before.
func (a *ahead) store(n page.Num) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	block := n &^ (aheadPages - 1)
	put := a.stack[block] | 1<<(n-block)
	for i := page.Num(0); i < aheadPages; {
		k := page.Num(0)
		var from page.Addr
		for ; i+k < aheadPages && put&(1<<(i+k)) == 0; k++ {
			shadow, st := a.v.lookup(block + i + k)
			if st != isHere || k > 0 && shadow != from+page.Addr(k)<<page.Shift {
				break
			}
			if k == 0 {
				from = shadow
			}
		}
		if k == 0 {
			i++
			continue
		}
		b := a.buf[:k<<page.Shift]
		if m, err := unix.Pread(a.v.mem, b, int64(from)); err != nil || m != len(b) {
			return
		}
		if err := a.v.s.fs.StoreImage(uint64((block + i).Addr()), b); err != nil {
			a.v.s.log.Debug("page cache", "err", err)
			return
		}
		put |= (1<<k - 1) << i
		i += k
	}
	a.stack[block] = put
}
