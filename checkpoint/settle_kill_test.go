package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// envSettling makes the test binary a settler that dies by SIGKILL at a kill point:
// "PID DEV N OUTPUT", where OUTPUT is what the program veiled has written. N is 0 to
// come through and print the points it passed.
const envSettling = "PAGEFERRY_TEST_SETTLING"

func settlingVictim(v string) error {
	var pid, at int
	var dev uint64
	var output string
	if _, err := fmt.Sscan(v, &pid, &dev, &at, &output); err != nil {
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

func settlingCmd(v *veiled, at int) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d %s", envSettling, v.Pid(), v.dev, at, v.Output))
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
