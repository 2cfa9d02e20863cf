package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

func require(t *testing.T) {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2, testutil.Userfaultfd, testutil.Namespaces)
}

func TestBusyPID(t *testing.T) {
	require(t)
	for name, busy := range map[string]string{"pid": "pid", "thread": "thread"} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx := timed(t)
			other := testutil.Start(t, "sleep", "60")
			make := func() (*image.Image, []image.Memory, *pages) {
				pid := freePID(t)
				if busy == "pid" {
					pid = other.Pid()
				}
				img, mem, trap, _ := tiny(t, pid)
				if busy == "thread" {
					second := img.Processes[0].Threads[0]
					second.TID = other.Pid()
					img.Processes[0].Threads = append(img.Processes[0].Threads, second)
				}
				return img, mem, trap
			}
			cfg := config(t)
			cfg.PIDNamespace = NamespaceHost
			s, err := Prepare(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			img, mem, trap := make()
			err = s.Rebuild(ctx, img, mem, trap)
			trap.close()
			if !errors.Is(err, ErrPIDBusy) || !strings.Contains(err.Error(), fmt.Sprint(other.Pid())) {
				t.Fatalf("in the host's namespace: %v, want %v and the number", err, ErrPIDBusy)
			}
			cfg.PIDNamespace = NamespaceAuto
			if s, err = Prepare(ctx, cfg); err != nil {
				t.Fatal(err)
			}
			defer s.Abort(ctx)
			img, mem, trap = make()
			defer trap.close()
			if err := s.Rebuild(ctx, img, mem, trap); err != nil {
				t.Fatal(err)
			}
			st, err := proc.ReadStatus(s.PID())
			if err != nil {
				t.Fatal(err)
			}
			if len(st.NSPID) < 2 || st.NSPID[len(st.NSPID)-1] != img.Processes[0].PID {
				t.Errorf("pids %v, want %d in a namespace of its own", st.NSPID, img.Processes[0].PID)
			}
			if err := s.Abort(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("before the image is there", func(t *testing.T) {
		testutil.NoLeaks(t)
		cfg := config(t)
		cfg.PIDNamespace, cfg.PID = NamespaceHost, testutil.Start(t, "sleep", "60").Pid()
		if s, err := Prepare(timed(t), cfg); !errors.Is(err, ErrPIDBusy) {
			t.Errorf("%v, %v, want %v", s, err, ErrPIDBusy)
		}
		cfg.Monotonic, cfg.Boottime = time.Hour, time.Hour
		if s, err := Prepare(timed(t), cfg); !errors.Is(err, ErrPIDBusy) {
			t.Errorf("with clocks: %v, %v, want %v", s, err, ErrPIDBusy)
		}
	})
}

// A process that Prepare made is kept if it fits and made again if not.
func TestPreparedProcess(t *testing.T) {
	require(t)
	for name, tc := range map[string]struct {
		ahead time.Duration // of the image's clocks at Prepare
		whole bool          // session and group known at Prepare
		kept  bool
	}{
		"kept": {time.Millisecond, true, true}, "session later": {time.Millisecond, false, true},
		"behind": {-time.Hour, true, false}, "far ahead": {time.Hour, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx := timed(t)
			cfg := config(t)
			pid := freePID(t)
			img, mem, trap, _ := tiny(t, pid)
			defer trap.close()
			cfg.PID = pid
			if tc.whole {
				cfg.PGID, cfg.SID = pid, pid
			}
			cfg.Monotonic, cfg.Boottime = img.Monotonic+tc.ahead, img.Boottime+tc.ahead
			s, err := Prepare(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Abort(ctx)
			if s.PID() != pid {
				t.Fatalf("pid %d after Prepare, want %d", s.PID(), pid)
			}
			ns := timeNamespace(t, pid)
			if err := s.Rebuild(ctx, img, mem, trap); err != nil {
				t.Fatal(err)
			}
			if got := timeNamespace(t, pid) == ns; got != tc.kept {
				t.Errorf("the same time namespace: %v, want %v", got, tc.kept)
			}
			after, err := proc.ReadStatus(pid)
			if err != nil {
				t.Fatal(err)
			}
			if after.NSSID[0] != pid || after.NSPGID[0] != pid {
				t.Errorf("session %v and group %v, want %d", after.NSSID, after.NSPGID, pid)
			}
		})
	}
}

func timeNamespace(t *testing.T, pid int) string {
	t.Helper()
	s, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/time", pid))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// badTrap fails where it is told to.
type badTrap struct {
	*pages
	adopt, wait error
}

func (b badTrap) Adopt(ctx context.Context, a Adoption) error {
	return errors.Join(b.pages.Adopt(ctx, a), b.adopt)
}
func (b badTrap) WaitEager(context.Context) error { return b.wait }

func TestFailureLeavesNothing(t *testing.T) {
	require(t)
	boom := errors.New("boom")
	for name, tc := range map[string]struct {
		step   string
		want   error  // unless nil
		says   string // unless empty
		spoil  func(p *image.Process, b *badTrap)
		config func(c *Config)
	}{
		"executable": {step: "check", want: ErrFileDiffers, says: "/no/such", spoil: func(p *image.Process, _ *badTrap) { p.Exe = "/no/such" }},
		"mapped file": {step: "check", want: ErrFileDiffers, says: "/bin/cat", spoil: func(p *image.Process, _ *badTrap) {
			p.VMAs = append(p.VMAs, image.VMA{Range: page.Range{Start: 0x7f1000000000, End: 0x7f1000001000}, Kind: image.VMAFile,
				Path: "/bin/cat", File: image.FileID{Size: 17}, Memory: -1})
		}},
		"hugetlbfs": {step: "check", want: ErrUnsupported, spoil: func(p *image.Process, _ *badTrap) { p.VMAs[0].Flags = []string{"rd", "ht"} }},
		"xstate":    {step: "check", want: ErrUnsupported, spoil: func(p *image.Process, _ *badTrap) { p.Threads[0].XState = p.Threads[0].XState[:600] }},
		"capability": {step: "check", want: ErrUnsupported, spoil: func(p *image.Process, _ *badTrap) {
			p.Creds.CapEff = 1 << 63
		}},
		"mapping above the end": {step: "mappings", says: "7fffffffe000", spoil: func(p *image.Process, _ *badTrap) {
			p.VMAs = append(p.VMAs, image.VMA{Range: page.Range{Start: 0x7fffffffe000, End: 0x800000000000}, Kind: image.VMAAnon, Memory: -1})
		}},
		"trap": {step: "trap", want: boom, spoil: func(_ *image.Process, b *badTrap) { b.adopt = boom }},
		"directory": {step: "process", want: unix.ENOENT, says: "/no/such/dir", spoil: func(p *image.Process, _ *badTrap) {
			p.Cwd = "/no/such/dir"
		}},
		"timer": {step: "process", says: "timer 3", spoil: func(p *image.Process, _ *badTrap) {
			p.PosixTimers = []image.PosixTimer{{ID: 3, Clock: 999, Notify: 1}}
		}},
		"eager pages": {step: "memory", want: boom, spoil: func(_ *image.Process, b *badTrap) { b.wait = boom }},
		"registers":   {step: "registers", says: "registers of thread", spoil: func(p *image.Process, _ *badTrap) { p.Threads[0].Regs.CS = 0x10 }},
		"registers in a namespace": {step: "registers", spoil: func(p *image.Process, _ *badTrap) { p.Threads[0].Regs.CS = 0x10 },
			config: func(c *Config) { c.PIDNamespace = NamespaceNew }},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx := timed(t)
			cfg := config(t)
			if tc.config != nil {
				tc.config(&cfg)
			}
			img, mem, trap, _ := tiny(t, freePID(t))
			defer trap.close()
			b := badTrap{pages: trap}
			tc.spoil(&img.Processes[0], &b)
			s, err := Prepare(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			err = s.Rebuild(ctx, img, mem, b)
			var e *Error
			if !errors.As(err, &e) || e.Step != tc.step || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(fmt.Sprint(err), tc.says) {
				t.Errorf("%v, want step %q, %v, %q", err, tc.step, tc.want, tc.says)
			}
			if _, err := os.Stat(s.Cgroup()); !os.IsNotExist(err) {
				t.Errorf("the cgroup is still there: %v", err)
			}
			if err := s.Abort(ctx); err != nil {
				t.Errorf("abort after it: %v", err)
			}
			if err := s.Park(ctx); !errors.Is(err, ErrState) {
				t.Errorf("park after it: %v", err)
			}
		})
	}
}

// A process that waits for a page that never comes, in the middle of the
// rebuild, must not hold up whoever wants to end it.
func TestCancelWhileAPageIsMissing(t *testing.T) {
	require(t)
	for _, how := range []string{"context", "abort"} {
		t.Run(how, func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			cfg := config(t)
			img, mem, trap, _ := tiny(t, freePID(t))
			defer trap.close()
			p := &img.Processes[0]
			area := p.VMAs[1].Range
			p.Threads[0].Rseq = image.Rseq{Ptr: uint64(area.Start) + 1024, Size: 32, Sig: 0x53053053}
			delete(trap.content, area.Start)
			s, err := Prepare(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- s.Rebuild(ctx, img, mem, trap) }()
			testutil.Eventually(t, limit, func() error {
				b, _ := os.ReadFile(s.Cgroup() + "/cgroup.procs")
				for pid := range strings.FieldsSeq(string(b)) {
					w, _ := os.ReadFile("/proc/" + pid + "/wchan")
					if strings.Contains(string(w), "handle_userfault") {
						return nil
					}
				}
				return errors.New("it does not wait for the page")
			})
			if how == "abort" {
				if err := s.Abort(context.Background()); err != nil {
					t.Errorf("abort: %v", err)
				}
			} else {
				cancel()
			}
			select {
			case err := <-done:
				if err == nil {
					t.Error("the rebuild came to an end")
				}
			case <-time.After(limit):
				t.Fatal("the rebuild still hangs")
			}
		})
	}
}

func TestReattach(t *testing.T) {
	require(t)
	prepare := func(t *testing.T, ns string) (Config, *pages) {
		ctx := timed(t)
		cfg := config(t)
		cfg.PIDNamespace = ns
		img, mem, trap, _ := tiny(t, freePID(t))
		s, err := Prepare(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Rebuild(ctx, img, mem, trap); err != nil {
			t.Fatal(err)
		}
		if err := s.Park(ctx); err != nil {
			t.Fatal(err)
		}
		cfg.PID = img.Processes[0].PID
		return cfg, trap
	}
	for _, ns := range []string{NamespaceHost, NamespaceNew} {
		t.Run("abort "+ns, func(t *testing.T) {
			testutil.NoLeaks(t)
			cfg, trap := prepare(t, ns)
			defer trap.close()
			s, err := Reattach(timed(t), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Abort(timed(t)); err != nil {
				t.Fatal(err)
			}
			if _, err := Reattach(timed(t), cfg); !errors.Is(err, ErrNoSkeleton) {
				t.Errorf("once more: %v, want %v", err, ErrNoSkeleton)
			}
		})
		t.Run("end of a released one "+ns, func(t *testing.T) {
			testutil.NoLeaks(t)
			cfg, trap := prepare(t, ns)
			defer trap.close()
			s, err := Reattach(timed(t), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(s.PID(), unix.SIGSTOP); err != nil { // or it ends by itself
				t.Fatal(err)
			}
			if err := s.Release(timed(t)); err != nil {
				t.Fatal(err)
			}
			if err := s.Abort(timed(t)); !errors.Is(err, ErrState) {
				t.Errorf("abort: %v, want %v", err, ErrState)
			}
			for range 2 {
				if err := s.End(timed(t)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := Reattach(timed(t), cfg); !errors.Is(err, ErrNoSkeleton) {
				t.Errorf("once more: %v, want %v", err, ErrNoSkeleton)
			}
		})
		t.Run("killed before its release "+ns, func(t *testing.T) {
			testutil.NoLeaks(t)
			cfg, trap := prepare(t, ns)
			defer trap.close()
			s, err := Reattach(timed(t), cfg)
			if err != nil {
				t.Fatal(err)
			}
			pid := s.PID()
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, limit, func() error {
				if unix.Kill(pid, 0) != unix.ESRCH {
					return errors.New("it is there")
				}
				return nil
			})
			if err := s.Release(timed(t)); !errors.Is(err, proc.ErrGone) {
				t.Errorf("released: %v, want %v", err, proc.ErrGone)
			}
			if err := s.Abort(timed(t)); err != nil {
				t.Fatal(err)
			}
		})
		t.Run("release "+ns, func(t *testing.T) {
			testutil.NoLeaks(t)
			cfg, trap := prepare(t, ns)
			defer trap.close()
			s, err := Reattach(timed(t), cfg)
			if err != nil {
				t.Fatal(err)
			}
			pid := s.PID()
			if err := s.Release(timed(t)); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, limit, func() error {
				if err := unix.Kill(pid, 0); err != unix.ESRCH {
					return fmt.Errorf("pid %d has not run to its end: %v", pid, err)
				}
				return nil
			})
		})
	}
}
