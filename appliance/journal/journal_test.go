package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func record(state string) migrate.Record {
	return migrate.Record{
		Migration: transport.MigrationID{1, 2, 3}, Role: migrate.RoleSource, State: state,
		Time: time.Unix(1700000000, 123).UTC(), Started: time.Unix(1600000000, 0).UTC(), Mode: migrate.ModePostCopy,
		PeerName: "b", PeerAddress: "10.0.0.2:7711", PeerIncarnation: migrate.Incarnation{9}, SourcePID: 42, Comm: "redis-server",
		Reason: strings.Repeat("r", migrate.MaxReason), Hint: bytes.Repeat([]byte{7}, migrate.MaxHint),
	}
}

func open(t *testing.T, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func create(t *testing.T, s *Store, r migrate.Record) *Journal {
	t.Helper()
	j, err := s.Create(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j.(*Journal)
}

func last(t *testing.T, s *Store) string {
	t.Helper()
	j, err := s.Open(record("").Migration, migrate.RoleSource)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	r, err := j.Last()
	if err != nil {
		t.Fatal(err)
	}
	return r.State
}

func TestRoundTrip(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	want := record("preparing")
	j := create(t, s, want)
	before := size(t, s)
	for i := range 3 * slots {
		want = record(fmt.Sprint("state ", i))
		if err := j.Append(want); err != nil {
			t.Fatal(err)
		}
		got, err := s.Open(want.Migration, want.Role)
		if err != nil {
			t.Fatal(err)
		}
		r, _ := got.Last()
		got.Close()
		if fmt.Sprintf("%+v", r) != fmt.Sprintf("%+v", want) {
			t.Fatalf("read %+v\nwrote %+v", r, want)
		}
	}
	if after := size(t, s); after != before {
		t.Errorf("the file grew: %+v, was %+v", after, before)
	}
	all, err := j.All()
	if err != nil || len(all) != slots {
		t.Fatalf("%d records in the ring of %d: %v", len(all), slots, err)
	}
	for i, r := range all {
		if want := fmt.Sprint("state ", 2*slots+i); r.State != want {
			t.Errorf("record %d is %q, want %q", i, r.State, want)
		}
	}
	recs, err := s.List()
	if err != nil || len(recs) != 1 || recs[0].State != want.State {
		t.Fatalf("List: %v, %v", recs, err)
	}
	if err := j.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(want.Migration, want.Role); !errors.Is(err, migrate.ErrNoJournal) {
		t.Fatalf("after Remove: %v", err)
	}
	if err := j.Append(want); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("Append after Remove: %v", err)
	}
}

func size(t *testing.T, s *Store) [2]int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(s.dir, fileName(record("").Migration, migrate.RoleSource)), &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o777 != 0o600 {
		t.Errorf("mode %o", st.Mode)
	}
	return [2]int64{st.Size, st.Blocks}
}

// TestTorn tears the newest record at every length: the one before it counts.
func TestTorn(t *testing.T) {
	for n := 0; n < blockSize; n += 97 {
		armed := false
		s := open(t, t.TempDir(), Options{Inject: func(op Op, _ string, b []byte) (int, error) {
			if armed && op == OpWrite {
				armed = false
				return n, unix.EIO
			}
			return 0, nil
		}})
		j := create(t, s, record("preparing"))
		if err := j.Append(record("committed")); err != nil {
			t.Fatal(err)
		}
		armed = true
		if err := j.Append(record("serving")); !errors.Is(err, unix.EIO) {
			t.Fatalf("torn at %d: Append says %v", n, err)
		}
		block, err := j.encode(record("serving"), 3)
		if err != nil {
			t.Fatal(err)
		}
		whole := n >= slotHeader+int(binary.LittleEndian.Uint32(block))
		if got, want := last(t, s), map[bool]string{false: "committed", true: "serving"}[whole]; got != want {
			t.Fatalf("torn at %d: %q is the last, want %q", n, got, want)
		}
		// What comes next counts for more than what may be there.
		if err := j.Append(record("aborted")); err != nil {
			t.Fatal(err)
		}
		if got := last(t, s); got != "aborted" {
			t.Fatalf("torn at %d: %q after aborted", n, got)
		}
	}
}

// TestFailingForEver: however often a write fails, the last durable record is
// not overwritten.
func TestFailingForEver(t *testing.T) {
	armed := false
	s := open(t, t.TempDir(), Options{Inject: func(op Op, _ string, b []byte) (int, error) {
		if armed && op == OpWrite {
			return 100, unix.EIO
		}
		return 0, nil
	}})
	j := create(t, s, record("preparing"))
	armed = true
	for range 5 * slots {
		if err := j.Append(record("committed")); err == nil {
			t.Fatal("the write did not fail")
		}
		if got := last(t, s); got != "preparing" {
			t.Fatalf("%q is the last", got)
		}
	}
}

// TestCreateFails fails every step of making a journal: nothing is left, and
// want of space is said to be that.
func TestCreateFails(t *testing.T) {
	for step := 1; ; step++ {
		n, failed := 0, Op("")
		armed := false
		s := open(t, t.TempDir(), Options{Inject: func(op Op, _ string, b []byte) (int, error) {
			if n++; armed && n == step {
				failed = op
				return len(b) / 2, unix.ENOSPC
			}
			return 0, nil
		}})
		n, armed = 0, true
		j, err := s.Create(record("preparing"))
		if err == nil {
			j.Close()
			if step < 4 {
				t.Fatalf("Create has only %d steps", step)
			}
			return
		}
		if !errors.Is(err, migrate.ErrNoSpace) {
			t.Errorf("%s: %v", failed, err)
		}
		entries, _ := os.ReadDir(s.dir)
		for _, e := range entries {
			if e.Name() != incarnationName && e.Name() != lockName {
				t.Errorf("%s: %s is left", failed, e.Name())
			}
		}
	}
}

func TestFullDisk(t *testing.T) {
	testutil.Require(t, testutil.Root)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	j, err := s.Create(record("preparing"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 2 * slots {
		if err := j.Append(record("committed")); err != nil {
			t.Fatalf("record %d on a full disk: %v", i, err)
		}
	}
	other := record("preparing")
	other.Migration[0] = 99
	if _, err := s.Create(other); !errors.Is(err, migrate.ErrNoSpace) {
		t.Fatalf("Create on a full disk: %v", err)
	}
}

func TestExists(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	j := create(t, s, record("preparing"))
	if err := j.Append(record("committed")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(record("preparing")); !errors.Is(err, migrate.ErrExists) {
		t.Fatal(err)
	}
	if got := last(t, s); got != "committed" {
		t.Fatalf("overwritten: %q", got)
	}
	dest := record("prepared")
	dest.Role = migrate.RoleDestination
	create(t, s, dest)
	if recs, err := s.List(); err != nil || len(recs) != 2 {
		t.Fatalf("%v, %v", recs, err)
	}
}

func TestIncarnation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	one := s.Incarnation()
	if one.IsZero() {
		t.Fatal("no incarnation")
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrBusy) {
		t.Fatalf("a second daemon: %v", err)
	}
	s.Close()
	// What a crash left without a name is gone afterwards.
	os.WriteFile(filepath.Join(dir, "x"+newSuffix), nil, 0o600)
	s = open(t, dir, Options{})
	if s.Incarnation() != one {
		t.Fatal("another incarnation after a restart")
	}
	if _, err := os.Stat(filepath.Join(dir, "x"+newSuffix)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not swept: %v", err)
	}
	s.Close()
	os.WriteFile(filepath.Join(dir, incarnationName), []byte("0123"), 0o600)
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrDamaged) {
		t.Fatalf("damaged incarnation: %v", err)
	}
	os.Remove(filepath.Join(dir, incarnationName))
	s = open(t, dir, Options{})
	if s.Incarnation() == one {
		t.Fatal("a new store has the old incarnation")
	}
}

// TestDamaged: whatever bytes a journal file has, reading it says so or gives a
// record that was written.
func TestDamaged(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	s := open(t, t.TempDir(), Options{})
	j := create(t, s, record("preparing"))
	for i := range 5 {
		if err := j.Append(record(fmt.Sprint("state ", i))); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(s.dir, j.name)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		b := bytes.Clone(whole)
		for range 1 + rng.IntN(8) {
			switch rng.IntN(3) {
			case 0:
				b[rng.IntN(7*blockSize)] ^= 1 << rng.IntN(8)
			case 1:
				rng.Shuffle(slots, func(i, k int) { // blocks in other places
					x, y := b[blockSize*(1+i):blockSize*(2+i)], b[blockSize*(1+k):blockSize*(2+k)]
					tmp := bytes.Clone(x)
					copy(x, y)
					copy(y, tmp)
				})
			case 2:
				i := rng.IntN(slots)
				clear(b[blockSize*(1+i) : blockSize*(2+i)])
			}
		}
		if rng.IntN(10) == 0 {
			b = b[:rng.IntN(len(b))]
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		recs, err := s.List()
		if (err == nil) != (len(recs) == 1) {
			t.Fatalf("%d records and %v", len(recs), err)
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		for _, r := range recs {
			if r.State != "preparing" && !strings.HasPrefix(r.State, "state ") {
				t.Fatalf("%+v was never written", r)
			}
		}
	}
	// A damaged one hides no other.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := record("committed")
	other.Migration[0] = 99
	create(t, s, other)
	recs, err := s.List()
	if len(recs) != 1 || !errors.Is(err, ErrDamaged) {
		t.Fatalf("%v, %v", recs, err)
	}
}

func TestTooLarge(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	r := record("preparing")
	r.Hint = make([]byte, blockSize)
	if _, err := s.Create(r); err == nil {
		t.Fatal("a record larger than its slot was taken")
	}
	if recs, err := s.List(); len(recs) != 0 || err != nil {
		t.Fatalf("%v, %v", recs, err)
	}
}
