package restore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// limit is for one rebuild of a small process on a busy machine.
const limit = 30 * time.Second

// config is that of a test, with a cgroup parent that goes away with it.
func config(t *testing.T) Config {
	t.Helper()
	cfg := Config{ID: testutil.Name(), CgroupParent: "/" + testutil.Name()}
	t.Cleanup(func() {
		if err := Sweep(cfg); err != nil {
			t.Error(err)
		}
		g, err := parentGroup(cfg.CgroupParent)
		if err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, limit, func() error {
			err := errors.Join(Sweep(cfg), g.Remove(t.Context()))
			return err
		})
	})
	return cfg
}

func timed(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// pages is a Trap that has the content at hand.
type pages struct {
	content map[page.Addr][]byte
	got     Adoption
	eager   error
}

func (p *pages) Adopt(_ context.Context, a Adoption) error {
	p.got = a
	for at, b := range p.content {
		switch {
		case a.Memory.Lazy.Contains(at):
			if n, err := sys.UffdCopy(int(a.UFFD.Fd()), uint64(at), b, 0); err != nil || n != int64(len(b)) {
				return fmt.Errorf("UFFDIO_COPY to %v: %d of %d: %w", at, n, len(b), err)
			}
		case a.Memory.Eager.Contains(at):
			if _, err := a.Mem.WriteAt(b, int64(at)); err != nil {
				return err
			}
		default:
			return fmt.Errorf("content at %v, which the map does not know", at)
		}
	}
	return nil
}

func (p *pages) WaitEager(context.Context) error { return p.eager }

func (p *pages) close() {
	if p.got.Mem != nil {
		p.got.Mem.Close()
	}
	if p.got.UFFD != nil {
		p.got.UFFD.Close()
	}
}

// xstate is a valid extended state of this host.
func xstate(t *testing.T) []byte {
	t.Helper()
	tr := proc.NewTracer()
	defer tr.Close()
	p := testutil.Start(t, "sleep", "60")
	b := make([]byte, 16<<10)
	var err error
	tr.Do(func() {
		if err = seize(p.Pid()); err != nil {
			return
		}
		var n int
		n, err = sys.PtraceGetXState(p.Pid(), b)
		b = b[:n]
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// tiny is an image of a program that was never run: it writes its pid, the time
// on CLOCK_MONOTONIC and 16 bytes of its data to descriptor 1, and ends.
func tiny(t *testing.T, pid int) (*image.Image, []image.Memory, *pages, string) {
	t.Helper()
	const text, data = page.Addr(0x400000), page.Addr(0x7f0000000000)
	code := []byte{
		0xb8, 39, 0, 0, 0, 0x0f, 0x05, // getpid
		0x49, 0x89, 0x04, 0x24, // mov [r12], rax
		0xb8, 228, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x49, 0x8d, 0x74, 0x24, 0x08, 0x0f, 0x05, // clock_gettime(1, r12+8)
		0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x4c, 0x89, 0xe6, 0xba, 40, 0, 0, 0, 0x0f, 0x05, // write(1, r12, 40)
		0xb8, 231, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, // exit_group(0)
	}
	out := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(out, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(out, &st); err != nil {
		t.Fatal(err)
	}
	textPage, dataPage := make([]byte, page.Size), make([]byte, page.Size)
	copy(textPage, code)
	copy(dataPage[24:], "sixteen letters.")
	r := func(at page.Addr) page.Range { return page.Range{Start: at, End: at + page.Size} }
	p := image.Process{
		PID: pid, PGID: pid, SID: pid, HostPID: pid,
		Threads: []image.Thread{{
			TID: pid, XState: xstate(t), Comm: "tiny", AltStack: image.AltStack{Flags: sys.SSDisable},
			Regs: image.Regs{RIP: uint64(text), R12: uint64(data), CS: 0x33, SS: 0x2b, Flags: 0x202},
		}},
		VMAs: []image.VMA{
			{Range: r(text), Kind: image.VMAAnon, Prot: unix.PROT_READ | unix.PROT_EXEC, Memory: -1},
			{Range: r(data), Kind: image.VMAAnon, Prot: unix.PROT_READ | unix.PROT_WRITE, Memory: -1},
		},
		MM: image.MM{StartCode: uint64(text), EndCode: uint64(text) + 64, StartData: uint64(data), EndData: uint64(data) + 64,
			StartBrk: 0x500000, Brk: 0x500000, StartStack: uint64(data), ArgStart: uint64(data), ArgEnd: uint64(data), EnvStart: uint64(data), EnvEnd: uint64(data)},
		Exe: "/bin/sh", Cwd: "/tmp", Root: "/", Umask: 0o22, Dumpable: 1,
		Creds: image.Creds{CapBnd: 1<<41 - 1},
		FDs:   []image.FD{{Num: 1, File: 0}},
	}
	img := &image.Image{
		Processes: []image.Process{p},
		Files: []image.OpenFile{{Kind: image.FileRegular, Flags: unix.O_WRONLY, Path: out,
			ID: image.FileID{Dev: st.Dev, Ino: st.Ino, Size: st.Size, MTimeNS: st.Mtim.Nano(), Mode: st.Mode}}},
		Monotonic: 1000 * time.Hour, Boottime: 1001 * time.Hour,
	}
	if err := img.Validate(); err != nil {
		t.Fatal(err)
	}
	m := image.Memory{Lazy: page.NewSet(r(text), r(data))}
	return img, []image.Memory{m}, &pages{content: map[page.Addr][]byte{text: textPage, data: dataPage}}, out
}

// freePID is a pid that nobody has, and that nobody gets for a while: the kernel
// hands them out in ascending order, so it is one that lies behind the last.
func freePID(t *testing.T) int {
	t.Helper()
	number := func(name string) int {
		b, err := os.ReadFile("/proc/sys/kernel/" + name)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	last := number("ns_last_pid")
	if last < 10_000 {
		last = number("pid_max")
	}
	for pid := last - 1000; pid > last-8000; pid -= 7 {
		if unix.Kill(pid, 0) == unix.ESRCH {
			return pid
		}
	}
	t.Fatal("no free pid")
	return 0
}

func TestTinyProcess(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2, testutil.Userfaultfd, testutil.Namespaces)
	for _, ns := range []string{NamespaceHost, NamespaceNew} {
		t.Run(ns, func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx := timed(t)
			cfg := config(t)
			pid := freePID(t)
			img, mem, trap, out := tiny(t, pid)
			defer trap.close()
			cfg.PIDNamespace = ns
			s, err := Prepare(ctx, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Abort(ctx)
			if err := s.Rebuild(ctx, img, mem, trap); err != nil {
				t.Fatal(err)
			}
			if got := s.PID(); (got == pid) != (ns == NamespaceHost) {
				t.Errorf("pid %d on this host, want %d or, in a namespace, another", got, pid)
			}
			if err := s.Park(ctx); err != nil {
				t.Fatal(err)
			}
			if b, _ := os.ReadFile(out); len(b) != 0 {
				t.Fatalf("it wrote %q before it was released", b)
			}
			if err := s.Release(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.Release(ctx); err != nil {
				t.Errorf("once more: %v", err)
			}
			var b []byte
			testutil.Eventually(t, limit, func() error {
				b, _ = os.ReadFile(out)
				if len(b) != 40 {
					return fmt.Errorf("it wrote %d bytes", len(b))
				}
				return nil
			})
			le := binary.LittleEndian
			if got := int(le.Uint64(b)); got != pid {
				t.Errorf("it sees itself as pid %d, want %d", got, pid)
			}
			if !bytes.Equal(b[24:], []byte("sixteen letters.")) {
				t.Errorf("its data is %q", b[24:])
			}
			mono := time.Duration(le.Uint64(b[8:]))*time.Second + time.Duration(le.Uint64(b[16:]))
			if d := mono - img.Monotonic; d < 0 || d > limit {
				t.Errorf("its monotonic clock is %v off the image's", d)
			}
			if err := s.Abort(ctx); !errors.Is(err, ErrState) {
				t.Errorf("abort after the release: %v, want %v", err, ErrState)
			}
		})
	}
}

// imageTimer is an armed timer that does not fire soon.
func imageTimer(id int) image.PosixTimer {
	return image.PosixTimer{ID: id, Clock: unix.CLOCK_MONOTONIC, Notify: sys.SigevSignal, Signal: int32(unix.SIGALRM), ValueNS: int64(time.Hour)}
}
