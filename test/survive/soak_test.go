package survive_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// soakTime is how long everything happens at once: 2 minutes, or what PAGEFERRY_SOAK
// says (make soak).
func soakTime(t testing.TB) time.Duration {
	s := os.Getenv("PAGEFERRY_SOAK")
	if s == "" {
		return 2 * time.Minute
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("PAGEFERRY_SOAK: %v", err)
	}
	return d
}

// soakTraps are those that are used.
func soakTraps() []string {
	if s := os.Getenv("PAGEFERRY_SOAK_TRAPS"); s != "" {
		return strings.Split(s, ",")
	}
	return []string{"fuse", "fuse", "auto", "uffd"}
}

// soakGuests are the programs, all of different kinds but where PAGEFERRY_SOAK_GUESTS names
// others, for the search of a fault.
func soakGuests() []string {
	if s := os.Getenv("PAGEFERRY_SOAK_GUESTS"); s != "" {
		return strings.Split(s, ",")
	}
	return []string{"churn", "sparse", "trim", "go", "python", "workload", "churn"}
}

// soakCount is how many there are of a kind, per host: n, or what PAGEFERRY_SOAK_ and the
// kind say, for the search of a fault.
func soakCount(kind string, n int) int {
	if k, err := strconv.Atoi(os.Getenv("PAGEFERRY_SOAK_" + kind)); err == nil {
		return k
	}
	return n
}

// veiledGuests are programs that verify themselves, and stress what is different where
// a file shows their memory.
func veiledGuests(t testing.TB) map[string][]string {
	everything := testutil.CC(t, "everything")
	dir := filepath.Dir(testutil.Socket(t, "x"))
	module := func(name string, more ...string) []string {
		return append([]string{everything, "--only", name, "--veiled", "--sigcont-ok", "--threads", "2", "--dir", dir}, more...)
	}
	return map[string][]string{
		"small":    module("regs,sync,timers,memory", "--mem", "4", "--beat-us", "2000"),
		"churn":    module("churn"),
		"shapes":   module("shapes", "--without", "guards"),
		"halves":   module("halves", "--with", "growth"),
		"sparse":   module("sparse"),
		"spawn":    module("spawn"),
		"trim":     module("trim"),
		"go":       {testutil.GoProgram(t, "./test/programs/gcprog"), "-live", "16"},
		"python":   {python(t), "-u", filepath.Join(testutil.ModuleRoot(t), "test/programs/selfcheck.py")},
		"workload": {testutil.GoProgram(t, "./test/programs/workload"), "--size", "32MiB", "--rate", "100MiB/s", "--pattern", "edge"},
	}
}

// Everything at once: programs that verify themselves go to and fro between two hosts
// while others read what arrives, and readers and pagers
// are killed. Nothing may hang, and nothing be lost.
func TestEverythingAtOnce(t *testing.T) {
	begin(t)
	for _, procs := range []string{"1", "2"} {
		t.Run("GOMAXPROCS="+procs, func(t *testing.T) {
			t.Setenv("GOMAXPROCS", procs) // of the daemons and their pagers
			s := &soak{t: t, r: newRig(t), seed: rand.Uint64()}
			t.Logf("seed %d", s.seed)
			s.r.watch(t)
			s.run(soakTime(t) / 2)
		})
	}
}

type soak struct {
	t    *testing.T
	r    *rig
	seed uint64

	moved, stayed, reads, cutOff, kills atomic.Int64
}

func (s *soak) run(d time.Duration) {
	all := veiledGuests(s.t)
	var guests []*guest
	for _, name := range soakGuests() {
		guests = append(guests, s.r.selfChecking(s.t, s.r.nodes()[len(guests)%2], all[name]...))
	}
	ctx, stop := context.WithTimeout(s.t.Context(), d)
	defer stop()
	var wg sync.WaitGroup
	for i, g := range guests {
		wg.Go(func() {
			s.move(ctx, g, rand.New(rand.NewPCG(s.seed, uint64(i))))
			if s.t.Failed() {
				stop() // nothing is to be learned any more
			}
		})
	}
	for i, n := range s.r.nodes() {
		for k := range soakCount("READERS", 3) {
			wg.Go(func() { s.read(ctx, n, rand.New(rand.NewPCG(s.seed, uint64(10+3*i+k)))) })
		}
		if soakCount("KILLERS", 1) > 0 {
			wg.Go(func() { s.killPagers(ctx, n, rand.New(rand.NewPCG(s.seed, uint64(20+i)))) })
		}
	}
	wg.Wait()
	s.t.Logf("%d moves, %d that were given up; %d files read, %d readers killed; %d pagers killed",
		s.moved.Load(), s.stayed.Load(), s.reads.Load(), s.cutOff.Load(), s.kills.Load())
	searching := soakCount("READERS", 3) == 0 || soakCount("KILLERS", 1) == 0
	if (s.moved.Load() < 10 || s.reads.Load() < 10 || s.kills.Load() == 0) && !searching && !s.t.Failed() {
		s.t.Error("hardly anything happened")
	}
	for _, g := range guests {
		if g.outer() != 0 {
			g.beat(2)
			g.verify()
		} else {
			s.t.Errorf("%s is gone: %s", g.identity, g.said())
		}
	}
	for _, n := range s.r.nodes() { // the readers'
		if err := os.Remove(filepath.Join(n.host.Cgroup(), "reader")); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.t.Error(err)
		}
	}
	s.r.clean(s.t)
}

// move moves a guest to and fro. A move may be given up where its pager is killed; the
// guest lives on where it was then.
func (s *soak) move(ctx context.Context, g *guest, rnd *rand.Rand) {
	traps := soakTraps()
	for ctx.Err() == nil && !s.t.Failed() {
		g.trap = traps[rnd.IntN(len(traps))]
		req := g.request([]string{"postcopy", "hybrid", "precopy"}[rnd.IntN(3)])
		if req.Mode != "postcopy" {
			req.MaxDowntimeMS = 3000
		}
		if rnd.IntN(2) == 0 {
			req.MaxBandwidth = "40MiB/s" // it arrives for a while
		}
		rep, err := g.migrateWithin(4*time.Minute, req) // pagers die meanwhile, again and again
		switch {
		case err != nil:
			s.t.Errorf("%s: %v", g.identity, err)
			return
		case rep.Outcome == appliance.OutcomeDone:
			s.moved.Add(1)
			g.at, g.pid = s.r.other(g.at), rep.DestPID
		case rep.Outcome == appliance.OutcomeFailed, rep.Outcome == appliance.OutcomeRefused && strings.Contains(rep.Reason, "pager"):
			s.stayed.Add(1)
		default:
			s.t.Errorf("%s: %s: %s", g.identity, rep.Outcome, rep.Reason)
			return
		}
		if said := g.said(); said != "" {
			s.t.Errorf("%s: %s", g.identity, said)
			return
		}
		before := s.r.recorder.Beats(g.identity).Count
		for end := time.Now().Add(20 * time.Second); s.r.recorder.Beats(g.identity).Count < before+2; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				s.t.Errorf("%s, pid %d of host %s, is silent:\n%s%s", g.identity, g.pid, g.at.name(), threads(g.outer()), g.at.log.tail(6000))
				return
			}
		}
	}
}

// read reads what is shown of any process that arrives at n. Some readers are killed.
func (s *soak) read(ctx context.Context, n *node, rnd *rand.Rand) {
	for ctx.Err() == nil {
		files, _ := filepath.Glob(n.path("/run/pageferry/*/maps"))
		if len(files) == 0 {
			time.Sleep(2 * time.Millisecond)
			continue
		}
		id := filepath.Base(filepath.Dir(files[rnd.IntN(len(files))]))
		script := fmt.Sprintf("cd /run/pageferry/%s && cat maps status resident vma/* files/*/* | wc -c", id)
		cmd := exec.Command("sh", "-c", script)
		cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		p, err := n.host.Start("reader", cmd)
		if err != nil {
			continue
		}
		limit := time.Duration(rnd.IntN(400)) * time.Millisecond
		if rnd.IntN(2) == 0 {
			limit = 10 * time.Second
		}
		select {
		case <-p.Done():
			s.reads.Add(1)
			continue
		case <-time.After(limit):
		}
		_ = unix.Kill(-p.PID(), unix.SIGKILL)
		select {
		case <-p.Done():
			s.cutOff.Add(1)
		case <-time.After(10 * time.Second):
			s.t.Errorf("a reader does not end on SIGKILL:\n%s", threads(p.PID()))
			return
		}
	}
}

// killPagers kills one of n's pagers now and then.
func (s *soak) killPagers(ctx context.Context, n *node, rnd *rand.Rand) {
	s.r.killed.Store(true)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(500+rnd.IntN(4500)) * time.Millisecond):
		}
		ps, _ := n.pagers()
		if len(ps) == 0 {
			continue
		}
		p := slices.Sorted(slices.Values(ps))[rnd.IntN(len(ps))]
		if fd, err := unix.PidfdOpen(p, 0); err == nil {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			_ = unix.Close(fd)
			s.kills.Add(1)
		}
	}
}
