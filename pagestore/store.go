package pagestore

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// The memfd is an array of 64-bit words in the byte order of the host:
//
//	word 0            magic and version
//	word 1            next word that is not in use
//	word 2, 3         number of sources, of spaces
//	word 4            epoch of the lanes
//	word 5            flags
//	word 16 on        counters
//	word 64 on        maxSources entries of sourceWords
//	then              maxSpaces entries of spaceWords
//	then              ranges, bitmaps, logs and segments, as they come
//
// A count is raised after its entry is complete, and an entry's state is stored
// last, so that a kill in between leaves nothing half done.
const (
	magic      = 0x5046_5354_4f52_0001 // "PFSTOR", version 1
	wMagic     = 0
	wNext      = 1
	wSources   = 2
	wSpaces    = 3
	wEpoch     = 4
	wFlags     = 5
	wCounters  = 16
	maxSources = 64
	maxSpaces  = 4096

	sourceTable = 64
	spaceTable  = sourceTable + maxSources*sourceWords
	firstFree   = spaceTable + maxSpaces*spaceWords

	// capacity is virtual: only what is written takes memory.
	capacity = 8 << 30
)

// Counter names one of the counters that survive in the store.
type Counter int

const (
	Zeros    Counter = iota // pages that arrived as zero
	Dropped                 // pages given up before they arrived
	Faulted                 // pages asked for because a thread waited
	Doubles                 // pages that arrived a second time
	Faults                  // page fault events
	Forks                   // events of each kind
	Removes                 //
	Remaps                  //
	Unmaps                  //
	Bad                     // pages whose checksum was wrong
	Lanes                   // lanes lost
	WireIn                  // bytes received on lanes that are gone
	Kept                    // pages that were here before
	OneSided                // pages read from the source's memory by RDMA
	counters
)

// FlagPoisoned says that the source is lost for good, FlagFetching that the
// background stream has begun.
const (
	FlagPoisoned = 1 << iota
	FlagFetching
)

var (
	// ErrFull: the store cannot hold another space, or it is too large.
	ErrFull = errors.New("pagestore: full")
	// ErrFormat: the memfd does not hold a store that this version reads.
	ErrFormat = errors.New("pagestore: not a store of this version")
)

// Store is the state of one migration. Safe for concurrent use where methods
// do not say otherwise.
type Store struct {
	f   *os.File
	mem []byte
	w   []uint64

	mu      sync.Mutex
	sources atomic.Pointer[[]*Source] // in order of the table; replaced under mu
	spaces  atomic.Pointer[[]*Space]  // live ones; replaced under mu
	closed  bool
}

// Create makes an empty store in a new memfd called name.
func Create(name string) (*Store, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("pagestore: memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(capacity); err != nil {
		f.Close()
		return nil, fmt.Errorf("pagestore: size of memfd: %w", err)
	}
	s, err := mapStore(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	s.w[wNext] = firstFree
	atomic.StoreUint64(&s.w[wMagic], magic)
	return s, nil
}

// Open maps the store in f, which a former pager made, and takes ownership of f
// where it succeeds. Userfaultfds keep the numbers of the former pager: see
// Space.SetFD. What is in the logs is still to be applied.
func Open(f *os.File) (*Store, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() != capacity {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, st.Size())
	}
	s, err := mapStore(f)
	if err != nil {
		return nil, err
	}
	if err := s.load(); err != nil {
		s.f = nil
		s.Close()
		return nil, err
	}
	return s, nil
}

func mapStore(f *os.File) (*Store, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, capacity, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("pagestore: map: %w", err)
	}
	_ = unix.Madvise(mem, unix.MADV_DONTFORK)
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)
	s := &Store{f: f, mem: mem, w: wordsOf(mem)}
	s.sources.Store(new([]*Source))
	s.spaces.Store(new([]*Space))
	return s, nil
}

// load builds the Go side of what is in the memfd, which a trusted process
// wrote; it is checked all the same, so that damage does not panic.
func (s *Store) load() error {
	if s.w[wMagic] != magic {
		return fmt.Errorf("%w: magic %#x", ErrFormat, s.w[wMagic])
	}
	if n := s.w[wNext]; n < firstFree || n > uint64(len(s.w)) {
		return fmt.Errorf("%w: next word %d", ErrFormat, n)
	}
	ns, np := s.w[wSources], s.w[wSpaces]
	if ns > maxSources || np > maxSpaces {
		return fmt.Errorf("%w: %d sources, %d spaces", ErrFormat, ns, np)
	}
	var sources []*Source
	for i := range int(ns) {
		src, err := s.loadSource(i)
		if err != nil {
			return err
		}
		sources = append(sources, src)
	}
	s.sources.Store(&sources)
	for i := range int(np) {
		if s.w[spaceAt(i)+pState] != stateLive {
			continue
		}
		sp, err := s.loadSpace(i)
		if err != nil {
			return err
		}
		s.list(sp)
	}
	return nil
}

// File is the memfd; it stays the store's.
func (s *Store) File() *os.File { return s.f }

// Close unmaps the store and closes the memfd. No method of the store, its
// sources and spaces may be called any more. Idempotent.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := unix.Munmap(s.mem)
	if s.f != nil {
		err = errors.Join(err, s.f.Close())
	}
	return err
}

// Sources are the address spaces of the source.
func (s *Store) Sources() []*Source { return *s.sources.Load() }

// Spaces are the live address spaces here.
func (s *Store) Spaces() []*Space { return *s.spaces.Load() }

// Source returns the source called id, or nil.
func (s *Store) Source(id page.Space) *Source {
	for _, src := range s.Sources() {
		if src.id == id {
			return src
		}
	}
	return nil
}

// Add adds n to a counter, Count reads it.
func (s *Store) Add(c Counter, n uint64)   { atomic.AddUint64(&s.w[wCounters+int(c)], n) }
func (s *Store) Count(c Counter) uint64    { return atomic.LoadUint64(&s.w[wCounters+int(c)]) }
func (s *Store) Epoch() uint32             { return uint32(atomic.LoadUint64(&s.w[wEpoch])) }
func (s *Store) SetEpoch(e uint32)         { atomic.StoreUint64(&s.w[wEpoch], uint64(e)) }
func (s *Store) Flag(f uint64) bool        { return atomic.LoadUint64(&s.w[wFlags])&f != 0 }
func (s *Store) SetFlag(f uint64)          { atomic.OrUint64(&s.w[wFlags], f) }
func (s *Store) word(i int) *uint64        { return &s.w[i] }
func (s *Store) load64(i int) uint64       { return atomic.LoadUint64(&s.w[i]) }
func (s *Store) store64(i int, v uint64)   { atomic.StoreUint64(&s.w[i], v) }
func (s *Store) words(off, n int) []uint64 { return s.w[off : off+n : off+n] }

// alloc takes n words, zeroed, that are never given back; mu is held.
func (s *Store) alloc(n int) (off int, err error) {
	next := s.w[wNext]
	if n < 0 || uint64(n) > uint64(len(s.w))-next {
		return 0, fmt.Errorf("%w: %d words wanted, %d left", ErrFull, n, uint64(len(s.w))-next)
	}
	s.store64(wNext, next+uint64(n))
	return int(next), nil
}

// Missing is how many pages are not settled in the spaces that were adopted,
// with forked true in those of their children as well.
func (s *Store) Missing(forked bool) (n uint64) {
	for _, sp := range s.Spaces() {
		if forked || !sp.Forked() {
			n += uint64(max(sp.missing.Load(), 0))
		}
	}
	return n
}

// Resident reports whether no page is missing anywhere.
func (s *Store) Resident() bool { return s.Missing(true) == 0 }
