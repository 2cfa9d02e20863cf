package transporttest

import (
	"testing"

	"github.com/pageferry/pageferry/transport"
)

func TestPair(t *testing.T) {
	Run(t, func(t *testing.T, id transport.LaneID, poolA, poolB *transport.Pool) *Pair {
		a, b := NewPair(id, poolA, poolB)
		return &Pair{
			A: a, B: b,
			Raw: func(p []byte) error { return a.Stream().Write([][]byte{p}) },
			Die: func() { _ = a.Close() },
		}
	})
}
