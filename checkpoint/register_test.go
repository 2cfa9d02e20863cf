package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Where there is no device, a descriptor that is none goes the same way. What a
// device makes of it is seen in test/onesided.

// nullDomain is /dev/null, which refuses every command.
func nullDomain() (Domain, error) {
	f, err := os.Open(os.DevNull)
	return Domain{File: f, Driver: 1, ID: 1}, err
}

// ownPages are all pages of a process.
func ownPages(pid int) (page.Set, error) {
	maps, err := proc.ReadMaps(pid)
	var all []page.Range
	for i := range maps {
		all = append(all, maps[i].Range)
	}
	return page.NewSet(all...), err
}

func TestRegisterRefused(t *testing.T) {
	for name, wait := range map[string]time.Duration{"refused": registerWait, "not sent": 1} {
		t.Run(name, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
			testutil.NoLeaks(t)
			defer func(old time.Duration) { registerWait = old }(registerWait)
			registerWait = wait
			r := testutil.NewRecorder(t)
			p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r})
			limit := unix.Rlimit{Cur: 64 << 10, Max: 1 << 20}
			if err := unix.Prlimit(p.Pid(), unix.RLIMIT_MEMLOCK, &limit, nil); err != nil {
				t.Fatal(err)
			}
			s, err := Open(p.Pid(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := looks(t, p.Pid())
			pages, err := ownPages(p.Pid())
			if err != nil {
				t.Fatal(err)
			}
			d, err := nullDomain()
			if err != nil {
				t.Fatal(err)
			}
			defer d.File.Close()
			for range 3 {
				reg, err := s.Register(t.Context(), d, pages)
				switch {
				case wait == 1 && errors.Is(err, errNotSent):
				case err != nil:
					t.Error(err)
				case len(reg.Regions) > 0 || len(reg.Refused) == 0 || !errors.Is(reg.Refused[0].Err, unix.ENOTTY) || reg.Left.Bytes() != pages.Bytes():
					t.Errorf("registered %v, refused %v, %d bytes left", reg.Regions, reg.Refused, reg.Left.Bytes())
				}
			}
			if now := looks(t, p.Pid()); now != before {
				t.Errorf("it was\n%s\nand is\n%s", before, now)
			}
			if err := s.Thaw(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Register(t.Context(), d, pages); !errors.Is(err, ErrState) {
				t.Errorf("of a running process: %v", err)
			}
			p.Beat(10)
			p.Verify()
			r.OneOwner(0)
		})
	}
}

// looks is what others see of a process that calls could have changed.
func looks(t testing.TB, pid int) string {
	t.Helper()
	var b strings.Builder
	for _, name := range []string{"maps", "limits"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		b.Write(text)
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, f := range fds {
		to, _ := os.Readlink(f)
		fmt.Fprintln(&b, filepath.Base(f), to)
	}
	return b.String()
}

func TestLongest(t *testing.T) {
	r := func(at, pages uint64) page.Range {
		return page.Range{Start: page.Addr(at * page.Size), End: page.Addr((at + pages) * page.Size)}
	}
	all := []page.Range{r(1, 3), r(10, 1), r(20, 7), r(40, 2)}
	for n, want := range map[int][]page.Range{0: {}, 1: {r(20, 7)}, 2: {r(1, 3), r(20, 7)}, 3: {r(1, 3), r(20, 7), r(40, 2)}, 4: all, 9: all} {
		if got := longest(all, n); !slices.Equal(got, want) {
			t.Errorf("%d of them: %v", n, got)
		}
	}
	if !slices.Equal(all, []page.Range{r(1, 3), r(10, 1), r(20, 7), r(40, 2)}) {
		t.Errorf("the list itself is %v now", all)
	}
}

// BenchmarkRegister is what it costs beside what the kernel does for the device.
func BenchmarkRegister(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	for _, threads := range []int{2, 100} {
		for _, n := range []int{1, 1000} {
			b.Run(fmt.Sprintf("threads=%d/regions=%d", threads, n), func(b *testing.B) {
				p := testutil.StartWorkload(b, testutil.ProgramConfig{Args: []string{"--size", "128MiB", "--threads", fmt.Sprint(threads)}})
				s, err := Open(p.Pid(), Options{})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				if err := s.Freeze(b.Context()); err != nil {
					b.Fatal(err)
				}
				pages, err := ownPages(p.Pid())
				if err != nil {
					b.Fatal(err)
				}
				present, err := s.registrable(pages.Ranges())
				if err != nil {
					b.Fatal(err)
				}
				whole := longest(present, 1)[0]
				var some page.Set
				for i := range page.Addr(n) {
					some.Add(page.PageOf(whole.Start + 2*i*page.Size))
				}
				d, err := nullDomain()
				if err != nil {
					b.Fatal(err)
				}
				defer d.File.Close()
				for b.Loop() {
					if reg, err := s.Register(b.Context(), d, some); err != nil || len(reg.Refused) != n {
						b.Fatal(len(reg.Refused), err)
					}
				}
			})
		}
	}
}
