package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// envSettling makes the test binary a settler that dies by SIGKILL at a kill point:
// "PID DEV N HOW OUTPUT", where OUTPUT is what the program veiled has written. N is 0 to
// come through and print the points it passed. HOW is 0 for a process of which nothing
// is registered, 1 to unregister what is replaced, 2 to have moves of it read.
const envSettling = "PAGEFERRY_TEST_SETTLING"

func settlingVictim(v string) error {
	var pid, at, how int
	var dev uint64
	var output string
	if _, err := fmt.Sscan(v, &pid, &dev, &at, &how, &output); err != nil {
		return err
	}
	text, err := os.ReadFile(output)
	if err != nil {
		return err
	}
	w, err := parseVeil(pid, dev, string(text))
	if err != nil {
		return err
	}
	n := 0
	inject.KillPoint = func(name string) {
		n++
		if at == 0 {
			fmt.Println(name)
		}
		if n == at {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	s, err := Open(pid, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	cfg := w.config()
	cfg.Backing = w.mixed
	if how > 0 {
		fd, err := openUserfault(pid, string(text))
		if err != nil {
			return err
		}
		cfg = w.early(w.config(), fd, how == 2)
		cfg.Limit = 300 * time.Microsecond
	}
	st, err := NewSettler(s, cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := st.Settle(ctx, nil); err != nil {
		return err
	}
	return st.Close()
}

// mixed says of every third region that it has no shadow but a file.
func (v *veil) mixed(m proc.Mapping) Backing {
	b := v.backing(m)
	if b.Later || m.Offset/(uint64(v.pages)<<12)%3 != 2 {
		return b
	}
	r := fromFiles(func(proc.Mapping) Backing { return Backing{Later: true} })(m)
	r.Bytes = b.Bytes
	return r
}

func settlingCmd(v *veiled, at int) *exec.Cmd { return settlingCmdHow(v, at, 0) }

func settlingCmdHow(v *veiled, at, how int) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d %d %s", envSettling, v.Pid(), v.dev, at, how, v.Output))
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}

// However a settler dies, the program goes on unharmed, and the next settler takes
// away what it has left.
func TestSettlerKilledAtEveryPoint(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	start := func() *veiled { return startVeiled(t, 6, 64, 3, "no-give") }
	v := start()
	cmd := settlingCmd(v, 0)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("a settler that nobody kills: %v\n%s", err, cmd.Stderr)
	}
	v.finish(t)
	points := strings.Fields(string(out))
	v = start()
	left := 0
	for _, n := range sample(points) {
		cmd := settlingCmd(v, n)
		err := cmd.Run()
		if ws, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool }); err == nil || !ok || !ws.Signaled() {
			// Another has settled most by now. Begin again.
			if l := v.left(t); l > 0 {
				t.Logf("not killed at point %d (%s), %d mappings are left: %v %s", n, points[n-1], l, err, cmd.Stderr)
			}
			v.finish(t)
			v = start()
			if err := settlingCmd(v, n).Run(); err == nil {
				t.Logf("not killed at point %d (%s)", n, points[n-1])
			}
		}
		if !v.Alive() {
			t.Fatalf("killed at point %d (%s): the program has ended\n%s", n, points[n-1], v.Text())
		}
		if v.left(t) == 0 {
			v.finish(t)
			v = start()
			continue
		}
		left++
	}
	t.Logf("%d points of %d kinds", len(points), left)
	cfg := v.config()
	cfg.Backing = v.mixed
	settleAll(t, v.Pid(), cfg, v.shadows()...)
	v.noTrace(t)
	v.finish(t)
}

// A settler is killed while it copies ahead and moves mappings aside. The next one finds
// what it has left, and what it has copied, in whichever state that is.
func TestSettlerKilledAhead(t *testing.T) {
	for how, name := range []string{1: "unregistered", 2: "moves are read"} {
		if how == 0 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
			testutil.NoLeaks(t)
			start := func() (*veiled, func()) {
				v := startVeiled(t, 3, 1024, 2, "uffd")
				fd := v.trap(t, nil)
				v.written(t, 10)
				return v, func() {
					cfg := v.early(v.config(), fd, how == 2)
					settleAll(t, v.Pid(), cfg, v.shadows()...)
					v.noTrace(t)
					v.finish(t)
				}
			}
			v, finish := start()
			cmd := settlingCmdHow(v, 0, how)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("a settler that nobody kills: %v\n%s", err, cmd.Stderr)
			}
			finish()
			points := strings.Fields(string(out))
			for _, want := range []string{"settle-taken", "settle-early", "settle-unmap", "gate-shut"} {
				if !slices.Contains(points, want) {
					t.Errorf("no point %s", want)
				}
			}
			killed := 0
			for _, n := range sample(points) {
				if name := points[n-1]; slices.Contains(points[n:], name) && !strings.HasPrefix(name, "settle-") && !strings.HasPrefix(name, "gate-") {
					continue // TestSettlerKilledAtEveryPoint has more of those
				}
				v, finish := start()
				if err := settlingCmdHow(v, n, how).Run(); err != nil {
					killed++
				}
				if !v.Alive() {
					t.Fatalf("killed at point %d (%s): the program has ended\n%s", n, points[n-1], v.Text())
				}
				finish()
				if t.Failed() {
					t.Fatalf("after a kill at point %d (%s)", n, points[n-1])
				}
			}
			t.Logf("%d of %d points", killed, len(points))
		})
	}
}

// A settler is killed at any moment.
func TestSettlerKilledAnyTime(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	v := startVeiled(t, 6, 512, 3, "no-give")
	killed := 0
	for range 40 {
		cmd := settlingCmd(v, 0)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := 10*time.Millisecond + time.Duration(rnd.Int64N(int64(60*time.Millisecond)))
		end := time.AfterFunc(after, func() { _ = cmd.Process.Signal(unix.SIGKILL) })
		err := cmd.Wait()
		end.Stop()
		if err != nil {
			killed++
		}
		if !v.Alive() {
			t.Fatalf("killed after %v: the program has ended\n%s", after, v.Text())
		}
		if v.left(t) == 0 {
			v.finish(t)
			v = startVeiled(t, 6, 512, 3, "no-give")
		}
	}
	cfg := v.config()
	cfg.Backing = v.mixed
	settleAll(t, v.Pid(), cfg, v.shadows()...)
	v.noTrace(t)
	v.finish(t)
	if killed < 10 {
		t.Errorf("only %d settlers were killed", killed)
	}
}

func (v *veiled) left(t testing.TB) (n int) {
	t.Helper()
	maps, err := proc.ReadMaps(v.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Dev == v.dev {
			n++
		}
	}
	return n
}

// noTrace sees that nothing of any settler is in the process.
func (v *veiled) noTrace(t testing.TB) {
	t.Helper()
	maps, err := proc.ReadSmaps(v.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Has("dc") && m.Name != "[vvar]" && m.Name != "[vvar_vclock]" && m.Name != "[vdso]" {
			t.Errorf("left in the process: %v, protection %d, flags %v", m.Range, m.Prot, m.Flags)
		}
	}
}
