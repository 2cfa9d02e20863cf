package pagestore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func rng(first, n int) page.Range {
	return page.Range{Start: page.Addr(first) * page.Size, End: page.Addr(first+n) * page.Size}
}

func create(t *testing.T) *Store {
	t.Helper()
	testutil.NoLeaks(t)
	st, err := Create("test-store")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

// reopen is what a new pager would find.
func reopen(t *testing.T, st *Store) *Store {
	t.Helper()
	fd, err := unix.FcntlInt(st.File().Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	now, err := Open(os.NewFile(uintptr(fd), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return now
}

func message(event uint8, a, b, c uint64) []byte {
	m := make([]byte, sys.UffdMsgSize)
	m[0] = event
	binary.LittleEndian.PutUint64(m[8:], a)
	binary.LittleEndian.PutUint64(m[16:], b)
	binary.LittleEndian.PutUint64(m[24:], c)
	return m
}

// model is a space as a table: which page of the source belongs where, and
// which are missing.
type model struct {
	at      map[int]int // page here -> page of the source
	missing map[int]bool
}

func (m model) clone() model {
	c := model{map[int]int{}, map[int]bool{}}
	for k, v := range m.at {
		c.at[k] = v
	}
	for k, v := range m.missing {
		c.missing[k] = v
	}
	return c
}

func (m model) compare(sp *Space) error {
	n := 0
	for _, miss := range m.missing {
		if miss {
			n++
		}
	}
	if sp.Missing() != n {
		return fmt.Errorf("%d pages missing, want %d", sp.Missing(), n)
	}
	seen := 0
	for p := range 700 {
		i, missing, ok := sp.Lookup(page.Addr(p)*page.Size + 123)
		want, mapped := m.at[p]
		if missing {
			seen++
		}
		if !mapped || !m.missing[want] {
			if ok && missing {
				return fmt.Errorf("page %d misses %d of the source, want nothing", p, i)
			}
			continue
		}
		if !ok || !missing || int(sp.src.Addr(i).Page()) != want {
			return fmt.Errorf("page %d: number %d, missing %v, ok %v; want page %d of the source", p, i, missing, ok, want)
		}
	}
	if seen != n {
		return fmt.Errorf("%d of %d missing pages have a place", seen, n)
	}
	// What is missing must have a target each, and only once.
	targets := map[int]bool{}
	for _, tg := range sp.Targets(rng(0, 700), nil) {
		for k := range tg.Dst.Pages() {
			p := int(tg.Dst.Start.Page()) + k
			if targets[p] || m.at[p] != int(sp.src.Addr(tg.First+k).Page()) {
				return fmt.Errorf("page %d is a wrong target", p)
			}
			targets[p] = true
		}
	}
	if len(targets) != n {
		return fmt.Errorf("%d targets for %d missing pages", len(targets), n)
	}
	return nil
}

// TestAgainstModel applies random changes, commits them or is killed before,
// and compares what a new pager would find.
func TestAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 8 {
		st := create(t)
		var lazy, eager page.Set
		m := model{map[int]int{}, map[int]bool{}}
		for p := 0; p < 300; p += 1 + rnd.IntN(4) {
			n := 1 + rnd.IntN(12)
			if rnd.IntN(5) == 0 {
				eager.Add(rng(p, n))
			} else {
				lazy.Add(rng(p, n))
			}
			p += n
		}
		for _, r := range eager.Ranges() {
			lazy.Remove(r)
		}
		src, err := st.AddSource(3, lazy, eager, page.Set{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range src.Len() {
			m.missing[int(src.Addr(i).Page())] = true
		}
		var segs []Segment
		for p := 0; p < 400; p += 50 {
			segs = append(segs, Segment{Dst: rng(p, 50), Src: page.Addr(p) * page.Size})
		}
		for p := range 400 {
			m.at[p] = p
		}
		root, err := st.AddSpace(src, 1, 1001, -1, segs)
		if err != nil {
			t.Fatal(err)
		}
		models := map[*Space]model{root: m}
		for range 60 {
			spaces := st.Spaces()
			sp := spaces[rnd.IntN(len(spaces))]
			m := models[sp]
			first, n := rnd.IntN(600), 1+rnd.IntN(60)
			switch rnd.IntN(8) {
			case 0, 1, 2:
				sp.RLock()
				for _, tg := range sp.Targets(rng(first, n), nil) {
					sp.Settle(tg.First, tg.First+tg.Dst.Pages())
					for k := range tg.Dst.Pages() {
						m.missing[int(src.Addr(tg.First+k).Page())] = false
					}
				}
				sp.RUnlock()
			case 3:
				change(sp, func(c *Change) { c.Drop(rng(first, n), true) })
				m.drop(first, n)
			case 4:
				change(sp, func(c *Change) { c.Unmap(rng(first, n)) })
				m.unmap(first, n)
			case 5, 6:
				to := rnd.IntN(600)
				if to < first+n && first < to+n {
					continue
				}
				change(sp, func(c *Change) {
					c.Remap(page.Addr(first)*page.Size, page.Addr(to)*page.Size, uint64(n)*page.Size)
				})
				m.remap(first, to, n)
			case 7:
				if len(spaces) > 4 {
					if spaces[3] != root {
						spaces[3].Gone()
						delete(models, spaces[3])
					}
					continue
				}
				sp.Lock()
				copy(sp.LogTail(), message(sys.UffdEventFork, 77, 0, 0))
				sp.LogRead(sys.UffdMsgSize)
				c := sp.Begin()
				child, made, err := c.Fork(0, 1000+rnd.IntN(1000))
				if err != nil || !made {
					t.Fatal(made, err)
				}
				child.Unlock()
				again, made, err := c.Fork(0, 5)
				if made || err != nil || again != child {
					t.Fatal("a fork was made twice")
				}
				if err := c.Commit(1); err != nil {
					t.Fatal(err)
				}
				child.Unlock()
				sp.Unlock()
				models[child] = m.clone()
			}
			late := reopen(t, st)
			for _, sp := range st.Spaces() {
				if err := models[sp].compare(sp); err != nil {
					t.Fatal(err)
				}
				i := slices.IndexFunc(late.Spaces(), func(o *Space) bool { return o.slot == sp.slot })
				l := late.Spaces()[i]
				if err := models[sp].compare(l); err != nil {
					t.Fatalf("after reopening: %v", err)
				}
				if l.FD() != sp.FD() || l.Forked() != sp.Forked() || l.PID() != sp.PID() || l.Pending() != 0 {
					t.Fatalf("space %d is another after reopening", i)
				}
			}
			if err := late.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func change(sp *Space, f func(*Change)) {
	sp.Lock()
	defer sp.Unlock()
	c := sp.Begin()
	f(c)
	if err := c.Commit(0); err != nil {
		panic(err)
	}
}

func (m model) drop(first, n int) {
	for p := first; p < first+n; p++ {
		if s, ok := m.at[p]; ok {
			m.missing[s] = false
		}
	}
}

func (m model) unmap(first, n int) {
	m.drop(first, n)
	for p := first; p < first+n; p++ {
		delete(m.at, p)
	}
}

func (m model) remap(from, to, n int) {
	taken := map[int]int{}
	for k := range n {
		if s, ok := m.at[from+k]; ok {
			taken[k] = s
			delete(m.at, from+k)
		}
	}
	m.unmap(to, n)
	for k, s := range taken {
		m.at[to+k] = s
	}
}

// TestLog: messages that were read and not applied are found by a new pager, in
// order and across the end of the ring, and no others.
func TestLog(t *testing.T) {
	st := create(t)
	src, err := st.AddSource(0, page.NewSet(rng(0, 10)), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := st.AddSpace(src, 1, 1001, -1, []Segment{{Dst: rng(0, 10)}})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(5, 5))
	next, done := uint64(1), uint64(1)
	sp.Lock()
	defer sp.Unlock()
	for range 2000 {
		tail := sp.LogTail()
		n := min(rnd.IntN(90), len(tail)/sys.UffdMsgSize)
		for k := range n {
			copy(tail[k*sys.UffdMsgSize:], message(sys.UffdEventRemove, next, next+1, 0))
			next++
		}
		sp.LogRead(n * sys.UffdMsgSize)
		late := reopen(t, st)
		l := late.Spaces()[0]
		l.Lock()
		for _, s := range []*Space{sp, l} {
			ms := s.Messages(0, nil)
			if len(ms) != int(next-done) || s.Pending() != len(ms) {
				t.Fatalf("%d messages pending, want %d", len(ms), next-done)
			}
			for i, m := range ms {
				if m.Event != sys.UffdEventRemove || m.Start != done+uint64(i) {
					t.Fatalf("message %d is %+v, want start %d", i, m, done+uint64(i))
				}
			}
		}
		l.Unlock()
		if err := late.Close(); err != nil {
			t.Fatal(err)
		}
		k := rnd.IntN(sp.Pending() + 1)
		if sp.LogFull() {
			k = sp.Pending()
		}
		if err := sp.Begin().Commit(k); err != nil {
			t.Fatal(err)
		}
		done += uint64(k)
	}
}

// TestAlias: a second mapping of shared memory leads to the same pages, which
// are placed once.
func TestAlias(t *testing.T) {
	st := create(t)
	src, err := st.AddSource(0, page.NewSet(rng(0, 20)), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := st.AddSpace(src, 1, 1001, -1, []Segment{{Dst: rng(0, 20), Flags: Shared}})
	if err != nil {
		t.Fatal(err)
	}
	change(sp, func(c *Change) { c.Remap(5*page.Size, 100*page.Size, 0) })
	for k := range 15 {
		i, missing, ok := sp.Lookup(page.Addr(100+k) * page.Size)
		if !ok || !missing || i != 5+k {
			t.Fatalf("page %d of the alias: %d, %v, %v", k, i, missing, ok)
		}
	}
	if ts := sp.Targets(rng(0, 20), nil); len(ts) != 1 || ts[0].Dst != rng(0, 20) {
		t.Fatalf("targets %v", ts)
	}
	change(sp, func(c *Change) { c.Drop(rng(100, 15), false) })
	if sp.Missing() != 20 {
		t.Fatalf("%d pages missing after the alias was unmapped", sp.Missing())
	}
	change(sp, func(c *Change) { c.Drop(rng(0, 4), true) })
	if sp.Missing() != 20 {
		t.Fatal("MADV_DONTNEED dropped shared content")
	}
	change(sp, func(c *Change) { c.Drop(rng(0, 4), false) })
	if sp.Missing() != 16 {
		t.Fatal("MADV_REMOVE dropped nothing")
	}
}

// TestHole: a hole ends where the source has a page, or the mapping ends.
func TestHole(t *testing.T) {
	st := create(t)
	src, err := st.AddSource(0, page.NewSet(rng(10, 2), rng(40, 1)), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := st.AddSpace(src, 1, 1001, -1, []Segment{{Dst: rng(0, 30)}, {Dst: rng(30, 20), Flags: Shared}})
	if err != nil {
		t.Fatal(err)
	}
	change(sp, func(c *Change) { c.Remap(5*page.Size, 100*page.Size, 20*page.Size) })
	for _, c := range []struct{ at, limit, want int }{
		{0, 9, 5}, {0, 3, 3}, {4, 9, 1}, {100, 9, 5}, {104, 9, 1}, {105, 9, 0}, {107, 20, 13}, {110, 4, 4}, {30, 9, 0}, {60, 9, 0},
	} {
		r := sp.Hole(page.Addr(c.at)*page.Size, uint64(c.limit)*page.Size)
		if r.Pages() != c.want || c.want > 0 && r.Start != page.Addr(c.at)*page.Size {
			t.Errorf("Hole(%d, %d) = %v, want %d pages", c.at, c.limit, r, c.want)
		}
	}
}

// TestReuse: spaces that are gone make room for others, and nobody who still
// knows them can touch those.
func TestReuse(t *testing.T) {
	st := create(t)
	src, err := st.AddSource(0, page.NewSet(rng(0, 1000)), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	root, err := st.AddSpace(src, 1, 1001, -1, []Segment{{Dst: rng(0, 1000)}})
	if err != nil {
		t.Fatal(err)
	}
	used := uint64(0)
	var old []*Space
	for k := range 3 * maxSpaces {
		root.Lock()
		child, made, err := root.Begin().Fork(0, 1002)
		if err != nil || !made {
			t.Fatal(k, made, err)
		}
		child.Unlock()
		if err := root.Begin().Commit(1); err != nil { // as if there had been a message
			t.Fatal(err)
		}
		root.pending = 0
		root.Unlock()
		if fd, _ := child.Gone(); fd != 1002 {
			t.Fatalf("descriptor %d", fd)
		}
		if fd, _ := child.Gone(); fd != -1 {
			t.Fatal("gone twice")
		}
		old = append(old, child)
		if used == 0 {
			used = st.w[wNext]
		}
	}
	if st.w[wNext] != used {
		t.Errorf("the store grew from %d to %d words", used, st.w[wNext])
	}
	if old[0].RLock() || old[0].Lock() {
		t.Error("a space that is gone can be locked")
	}
	if len(st.Spaces()) != 1 || len(src.Spaces()) != 1 {
		t.Errorf("%d spaces", len(st.Spaces()))
	}
}

// TestOpenDamaged: a store that is damaged is refused, not believed.
func TestOpenDamaged(t *testing.T) {
	rnd := rand.New(rand.NewPCG(9, 9))
	for range 200 {
		st, err := Create("test-store")
		if err != nil {
			t.Fatal(err)
		}
		src, err := st.AddSource(0, page.NewSet(rng(0, 100)), page.Set{}, page.Set{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.AddSpace(src, 1, 1001, -1, []Segment{{Dst: rng(0, 100)}}); err != nil {
			t.Fatal(err)
		}
		tables := []int{wMagic, wNext, wSources, wSpaces, sourceTable + rnd.IntN(sourceWords), spaceTable + rnd.IntN(spaceWords)}
		st.w[tables[rnd.IntN(len(tables))]] = rnd.Uint64()
		late, err := Open(st.File())
		if err == nil {
			late.f = nil
			err = late.Close()
		} else if !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		} else {
			err = nil
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
