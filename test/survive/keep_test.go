package survive_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// shell runs a command in the host and returns what it printed. What it fails with is
// part of the error.
func (n *node) shell(script string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := n.host.Run(ctx, "sh", append([]string{"-c", script + "\n", "sh"}, args...)...)
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return string(out), nil
}

// kept moves the guest with --shown keep and calls during when every page is there.
func (g *guest) kept(mode string, during func(n *node, id string)) appliance.Report {
	g.t.Helper()
	g.shown = "keep"
	return g.meanwhile(g.request(mode), func(rep appliance.Report) bool {
		return rep.State == "serving" && rep.PagesTotal > 0 && rep.PagesResident == rep.PagesTotal
	}, during)
}

// TestKept: with --shown keep the memory of a process that is here whole can be read as
// it was frozen, whatever the process writes, until it is released; pager and daemon
// may die meanwhile, and the process needs neither.
func TestKept(t *testing.T) {
	begin(t)
	r := newRig(t)
	for _, mode := range []string{"postcopy", "stop"} {
		t.Run(mode, func(t *testing.T) {
			r.watch(t)
			g := r.small(t, r.a, "--mem", "16")
			home := g.at
			rep := g.kept(mode, func(n *node, id string) {
				dir := "/run/pageferry/" + id
				testutil.Eventually(t, 20*time.Second, func() error { return n.free(id) })
				compare(t, g, n, dir)
				g.moved(t, n, dir)
				if mode == "postcopy" {
					g.alone(t, n, id, dir)
				}
				out, err := n.shell(pageferry(t)+" show $1 --mem", id[:12])
				if err != nil || !strings.Contains(out, dir+"/mem ") || !strings.Contains(out, "release "+id[:12]) {
					t.Errorf("show --mem: %v\n%s", err, out)
				}
				if out, err := n.shell(pageferry(t)+" release $1", id[:12]); err != nil || !strings.Contains(out, id) {
					t.Errorf("release: %v\n%s", err, out)
				}
			})
			g.at, g.pid = r.other(home), rep.DestPID
			g.beat(2)
			if _, err := os.Stat(g.at.path("/run/pageferry/" + rep.ID)); err == nil {
				t.Error("what showed it is there still")
			}
			if _, err := g.at.shell(pageferry(t)+" show $1 --mem", rep.ID); err == nil || !strings.Contains(err.Error(), "it has arrived") {
				t.Errorf("show --mem of one that has arrived: %v", err)
			}
			g.verify()
		})
	}
	r.clean(t)
}

// TestKeptByNobody: when pager and keeper die while memory is kept, only the view is
// lost. The process has all of its memory, and the migration ends as any other.
func TestKeptByNobody(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	g := r.small(t, r.a, "--mem", "16")
	home := g.at
	rep := g.kept("postcopy", func(n *node, id string) {
		testutil.Eventually(t, 20*time.Second, func() error { return n.free(id) })
		_, keepers := n.pagers()
		pagers := n.killPagers()
		for _, k := range keepers {
			if fd, err := unix.PidfdOpen(k, 0); err == nil {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				_ = unix.Close(fd)
			}
		}
		if pagers != 1 || len(keepers) != 1 {
			t.Errorf("%d pagers and %d keepers were killed", pagers, len(keepers))
		}
	})
	g.at, g.pid = r.other(home), rep.DestPID
	g.beat(2)
	g.verify()
	r.clean(t)
}

// free returns nil when the pager of a migration has let go of the process.
func (n *node) free(id string) error {
	b, err := os.ReadFile(n.path("/run/pageferry/arrivals/" + id + "/arrival.json"))
	var rec struct {
		Free bool `json:"free"`
	}
	if err == nil {
		err = json.Unmarshal(b, &rec)
	}
	if err == nil && !rec.Free {
		err = fmt.Errorf("the pager holds the process still: %s", b)
	}
	pagers, _ := n.pagers()
	for _, p := range pagers {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p))
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); strings.Contains(to, "userfaultfd") {
				err = errors.Join(err, fmt.Errorf("pager %d has %s of the process still", p, to))
			}
		}
	}
	return err
}

// moved fails unless the guest, which runs at n, has written since it was frozen, and
// what is shown of its memory is as it was.
func (g *guest) moved(t *testing.T, n *node, dir string) {
	t.Helper()
	pid := 0
	for _, p := range n.processes() {
		if p.self == g.self && p.comm == g.comm {
			pid = p.pid
		}
	}
	maps, err := proc.ReadMaps(g.outer())
	if err != nil {
		t.Error(err)
		return
	}
	differ := 0
	for _, m := range maps {
		if strings.HasPrefix(m.Name, "[v") || m.Bytes() > 16<<10 {
			continue
		}
		frozen, now := make([]byte, m.Bytes()), make([]byte, m.Bytes())
		if readMem(g.outer(), m.Start, frozen) != nil || readMem(pid, m.Start, now) != nil || bytes.Equal(frozen, now) {
			continue
		}
		differ++
		got, err := n.shell("dd if=$1/mem bs=4096 status=none skip=$2 count=$3", dir, fmt.Sprint(uint64(m.Start)>>page.Shift), fmt.Sprint(m.Pages()))
		if err != nil || got != string(frozen) {
			t.Errorf("%v, which the process has written: %v; what is shown is not what was frozen; as it is now: %v", m, err, got == string(now))
		}
	}
	if differ == 0 {
		t.Error("the process has written nothing: nothing was tested")
	}
}

// alone kills pager and daemon of n, one after the other.
func (g *guest) alone(t *testing.T, n *node, id, dir string) {
	t.Helper()
	beats := func() {
		before := g.r.recorder.Beats(g.identity).Count
		testutil.Eventually(t, 20*time.Second, func() error {
			if b := g.r.recorder.Beats(g.identity).Count; b < before+5 {
				return fmt.Errorf("%d heartbeats, wanted more than %d", b, before)
			}
			return nil
		})
	}
	if k := n.killPagers(); k != 1 {
		t.Errorf("%d pagers were killed", k)
	}
	beats()
	compare(t, g, n, dir) // by the next pager
	n.kill()
	beats()
	compare(t, g, n, dir)
	n.start(t)
	testutil.Eventually(t, 20*time.Second, func() error {
		c := n.api()
		defer c.Close()
		m, err := c.Memory(t.Context(), id)
		if err == nil && (m.Dir != dir || !m.Kept) {
			err = fmt.Errorf("%+v", m)
		}
		return err
	})
	compare(t, g, n, dir)
}
