package fusemem

import (
	"math/rand/v2"
	"sync"
)

// snapshots keep what status and resident told an open file, so that one that is read in pieces is
// of one piece, as with seq_file: a read at offset 0 takes a new one. They can be lost: who reads
// on after another pager took over reads a new one.
type snapshots struct {
	mu sync.Mutex
	m  map[uint64][]byte
}

// open returns a handle that no other pager has given.
func (s *snapshots) open() uint64 { return rand.Uint64() | 1 }

func (s *snapshots) release(fh uint64) {
	if fh == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, fh)
}

// read returns what stands at an offset of the handle's snapshot, at most n bytes.
func (s *snapshots) read(fh, offset uint64, n int, take func() ([]byte, error)) ([]byte, error) {
	s.mu.Lock()
	text, ok := s.m[fh]
	s.mu.Unlock()
	if !ok || offset == 0 {
		var err error
		if text, err = take(); err != nil {
			return nil, err
		}
		s.mu.Lock()
		if s.m == nil {
			s.m = map[uint64][]byte{}
		}
		s.m[fh] = text
		s.mu.Unlock()
	}
	return cut(text, offset, n), nil
}

// cut returns b from offset on, at most n bytes.
func cut(b []byte, offset uint64, n int) []byte {
	if offset >= uint64(len(b)) {
		return nil
	}
	b = b[offset:]
	return b[:min(n, len(b))]
}
