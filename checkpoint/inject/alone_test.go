package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// countProgram has threads that count, each for itself, in one page. It opens the
// file it is given as descriptor 7.
const countProgram = `
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static volatile unsigned long *count;
static void on(int sig) { count[500]++; }
static void *run(void *n) {
	long i = (long)n;
	for (;;) {
		count[i]++;
		if (i % 2)
			usleep(10);
	}
}
int main(int argc, char **argv) {
	pthread_t t;
	signal(SIGUSR1, on);
	dup2(open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600), 7);
	count = aligned_alloc(4096, 4096);
	for (long i = 1; i < 6; i++)
		pthread_create(&t, 0, run, (void *)i);
	printf("%lx\n", (long)count);
	fflush(stdout);
	run(0);
}`

const counters = 6

func readCounts(t *testing.T, m *proc.Memory, at page.Addr) (c [counters]uint64) {
	t.Helper()
	b := make([]byte, page.Size)
	if err := m.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return counts(b)
}

func counts(b []byte) (c [counters]uint64) {
	for i := range c {
		c[i] = binary.LittleEndian.Uint64(b[8*i:])
	}
	return c
}

// Wherever the tracer dies, no other thread runs before the batch has ended, and
// all do afterwards.
func TestRunAlone(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	file := filepath.Join(t.TempDir(), "counts")
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "count", countProgram), file), time.Minute)
	p.WaitText("\n", 10*time.Second)
	var at page.Addr
	if _, err := fmt.Sscanf(p.Text(), "%x", &at); err != nil {
		t.Fatal(err)
	}
	m, err := proc.OpenMemory(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	defer func() { KillPoint = nil }()
	ended := false
	for n := 1; !ended; n++ {
		if err := os.Truncate(file, 0); err != nil {
			t.Fatal(err)
		}
		name := ""
		err, ended = dieAlone(t, p.Pid(), at, n, &name)
		if ended && err != nil {
			t.Fatal(err)
		}
		// What was started comes to its end.
		switch name {
		case "gate-certain", "gate-batch", "gate-running", "gate-ran", "release", "release-mask", "release-regs", "":
			testutil.Eventually(t, 10*time.Second, func() error {
				b, err := os.ReadFile(file)
				if err == nil && len(b) < 2*page.Size {
					err = fmt.Errorf("killed at %s: %d bytes were written by the batch", name, len(b))
				}
				return err
			})
		}
		if b, _ := os.ReadFile(file); len(b) == 2*page.Size {
			first, second := counts(b), counts(b[page.Size:])
			if first != second {
				t.Errorf("killed at point %d (%s): others ran during the batch: %v, then %v", n, name, first, second)
			}
		} else if len(bytes.Trim(b, "\x00")) > 0 && name != "enter-mask" && name != "enter-regs" {
			t.Errorf("killed at point %d (%s): %d bytes of a batch", n, name, len(b))
		}
		before := readCounts(t, m, at)
		testutil.Eventually(t, 10*time.Second, func() error {
			now := readCounts(t, m, at)
			for i := range now {
				if now[i] == before[i] {
					return fmt.Errorf("killed at point %d (%s): thread %d does not run", n, name, i)
				}
			}
			return nil
		})
		p.Signal(unix.SIGUSR1)
		testutil.Eventually(t, 10*time.Second, func() error {
			b := make([]byte, page.Size)
			if err := m.ReadAt(b, at); err != nil {
				return err
			}
			if got := binary.LittleEndian.Uint64(b[8*500:]); got < uint64(n) {
				return fmt.Errorf("killed at point %d (%s): %d of %d signals came through", n, name, got, n)
			}
			return nil
		})
		if ended && n < 20 {
			t.Errorf("only %d points", n)
		}
	}
}

// dieAlone runs a batch alone and ends the tracer's thread at the n-th point from
// its beginning on; ended says that there were fewer.
func dieAlone(t *testing.T, pid int, at page.Addr, n int, name *string) (err error, ended bool) {
	t.Helper()
	tr := proc.NewTracer()
	defer tr.Close()
	tids, err := proc.Threads(pid)
	if err != nil || len(tids) != counters {
		t.Fatal(tids, err)
	}
	for _, tid := range tids {
		hold(t, tr, tid)
	}
	KillPoint = nil
	tg, err := BootstrapKept(tr, pid, pid, Room{Threads: 20, Arena: 64 << 10, Note: page.Size})
	if err != nil {
		t.Fatal(err)
	}
	b := tg.Batch()
	var ts [16]byte
	binary.LittleEndian.PutUint64(ts[8:], uint64(30*time.Millisecond))
	b.Call(unix.SYS_PWRITE64, 7, uint64(at), page.Size, 0)
	b.Call(unix.SYS_NANOSLEEP, b.Bytes(ts[:]), 0)
	b.Call(unix.SYS_PWRITE64, 7, uint64(at), page.Size, page.Size)
	points := 0
	KillPoint = func(point string) {
		if points++; points == n {
			*name = point
			runtime.Goexit() // on the tracer's thread, which ends
		}
	}
	err = b.RunAlone(pid, tids[1:], func() error {
		Point("gate-certain")
		return nil
	})
	if *name == "" {
		KillPoint = nil
		refused := errors.New("refused")
		no := tg.Batch()
		call := no.Call(unix.SYS_FTRUNCATE, 7, 0)
		if e := no.RunAlone(pid, tids[1:], func() error { return refused }); !errors.Is(e, refused) {
			t.Errorf("a batch that is refused: %v", e)
		}
		if _, e := call.Ret(); e == nil {
			t.Error("a batch that is refused was made")
		}
		for _, tid := range tids[1:] {
			letGo(t, tr, tid)
		}
		if _, _, e := tg.Rest(); e != nil {
			t.Fatal(e)
		}
		if e := tg.Close(pid); e != nil {
			t.Fatal(e)
		}
		letGo(t, tr, pid)
		return err, true
	}
	KillPoint = nil
	_ = tg.Drop()
	return nil, false
}
