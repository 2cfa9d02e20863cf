package page

import (
	"math/bits"
	"sync/atomic"
)

// Bitmap is one bit per page, over memory that the caller may share with
// another process (a memfd): words are only touched whole.
type Bitmap struct {
	w []uint64
	n int
}

// Words is how many 64-bit words a bitmap of n bits takes.
func Words(n int) int { return (n + 63) / 64 }

// NewBitmap returns a bitmap of n clear bits.
func NewBitmap(n int) *Bitmap { return &Bitmap{make([]uint64, Words(n)), n} }

// BitmapOver returns a bitmap of n bits over words, which must be at least
// Words(n) long and stay valid as long as the bitmap is in use.
func BitmapOver(words []uint64, n int) *Bitmap { return &Bitmap{words[:Words(n)], n} }

// Len is the number of bits.
func (b *Bitmap) Len() int { return b.n }

// AtomicTestAndSet sets bit i and reports whether it was set before.
func (b *Bitmap) AtomicTestAndSet(i int) bool {
	m := uint64(1) << (i & 63)
	return atomic.OrUint64(&b.w[i>>6], m)&m != 0
}

// AtomicClear clears bit i and reports whether it was set before.
func (b *Bitmap) AtomicClear(i int) bool {
	m := uint64(1) << (i & 63)
	return atomic.AndUint64(&b.w[i>>6], ^m)&m != 0
}

// AtomicGet reports whether bit i is set.
func (b *Bitmap) AtomicGet(i int) bool {
	return atomic.LoadUint64(&b.w[i>>6])>>(i&63)&1 != 0
}

// AtomicSetRange sets bits [i, j) and returns how many were clear before.
func (b *Bitmap) AtomicSetRange(i, j int) (newly int) {
	b.words(i, j, func(w *uint64, m uint64) {
		newly += bits.OnesCount64(m &^ atomic.OrUint64(w, m))
	})
	return newly
}

// AtomicClearRange clears bits [i, j) and returns how many were set before.
func (b *Bitmap) AtomicClearRange(i, j int) (were int) {
	b.words(i, j, func(w *uint64, m uint64) {
		were += bits.OnesCount64(m & atomic.AndUint64(w, ^m))
	})
	return were
}

func (b *Bitmap) words(i, j int, f func(w *uint64, mask uint64)) {
	for i < j {
		k := min(j, (i|63)+1)
		m := ^uint64(0) << (i & 63)
		if r := k & 63; r != 0 {
			m &= 1<<r - 1
		}
		f(&b.w[i>>6], m)
		i = k
	}
}

// Count is the number of set bits, each word read atomically.
func (b *Bitmap) Count() (n int) {
	for i := range b.w {
		n += bits.OnesCount64(atomic.LoadUint64(&b.w[i]))
	}
	return n
}

// NextSet returns the first set bit of [i, end), or end, which is at most Len.
func (b *Bitmap) NextSet(i, end int) int { return b.next(i, end, 0) }

// NextClear returns the first clear bit of [i, end), or end, which is at most Len.
func (b *Bitmap) NextClear(i, end int) int { return b.next(i, end, ^uint64(0)) }

func (b *Bitmap) next(i, end int, flip uint64) int {
	for i < end {
		w := (atomic.LoadUint64(&b.w[i>>6]) ^ flip) >> (i & 63)
		if w != 0 {
			return min(end, i+bits.TrailingZeros64(w))
		}
		i = (i | 63) + 1
	}
	return end
}
