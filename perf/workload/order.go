package workload

import "math/rand/v2"

// order chooses the pages that one thread writes.
type order struct {
	pattern Pattern
	pages   uint64
	at      uint64
	rng     *rand.Rand
	zipf    *rand.Zipf
	stride  uint64
}

// newOrder returns the order for one thread over that many pages.
func newOrder(p Pattern, pages int, seed uint64) *order {
	o := &order{pattern: p, pages: uint64(pages), rng: rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15))}
	if p == Zipf {
		o.zipf = rand.NewZipf(o.rng, 1.1, 1, o.pages-1)
		// Hot pages lie all over the memory, not side by side: rank i is page
		// i*stride, which meets every page once as stride is prime to pages.
		o.stride = o.pages*5/8 | 1
		for gcd(o.stride, o.pages) != 1 {
			o.stride += 2
		}
	}
	return o
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// next is the page to write next.
func (o *order) next() int {
	switch o.pattern {
	case Uniform:
		return int(o.rng.Uint64N(o.pages))
	case Zipf:
		return int(o.zipf.Uint64() * o.stride % o.pages)
	}
	n := o.at
	if o.at++; o.at == o.pages {
		o.at = 0
	}
	return int(n)
}
