package pager

import (
	"sync"

	"github.com/pageferry/pageferry/page"
)

// recentPages is how many pages a recent keeps.
const recentPages = 2048

// recent keeps pages of an image that were read last.
type recent struct {
	mu   sync.Mutex
	nums []page.Num // one more than the page's number, by its lowest bits
	buf  []byte
}

func (r *recent) put(first page.Num, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.nums == nil {
		r.nums, r.buf = make([]page.Num, recentPages), make([]byte, recentPages<<page.Shift)
	}
	for ; len(b) > 0; first, b = first+1, b[page.Size:] {
		k := first % recentPages
		r.nums[k] = first + 1
		copy(r.buf[k<<page.Shift:], b[:page.Size])
	}
}

// get reports whether all pages of b are there.
func (r *recent) get(first page.Num, b []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.nums == nil {
		return false
	}
	for ; len(b) > 0; first, b = first+1, b[page.Size:] {
		k := first % recentPages
		if r.nums[k] != first+1 {
			return false
		}
		copy(b[:page.Size], r.buf[k<<page.Shift:])
	}
	return true
}
