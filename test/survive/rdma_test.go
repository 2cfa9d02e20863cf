package survive_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

// TestOverRDMA moves programs between two hosts with soft-RoCE devices, which share a
// network namespace: there is no other in which the kernel has such devices.
func TestOverRDMA(t *testing.T) {
	begin(t)
	takeAlong(t)
	testutil.CC(t, "everything")
	limit := 20 * time.Minute
	if rdmaHops() > 10 {
		limit += time.Duration(rdmaHops()) * 10 * time.Second
	}
	vmtest.Run(t, limit, func(t *testing.T) {
		top := t
		a, b := vmtest.Pair(t)
		r := newRigIn(t, lab.Config{Addrs: []netip.Addr{a.Addr, b.Addr}}, "page_lanes: plain\n")
		for _, c := range []struct {
			name string
			test func(t *testing.T, r *rig)
		}{
			{"Redis", testRDMARedis},
			{"Disturbed", testRDMADisturbed},
			{"NotHere", testRDMANotHere},
			{"Soft", testRDMASoft},
		} {
			t.Run(c.name, func(t *testing.T) {
				r = r.whole(top)
				r.watch(t)
				c.test(t, r)
			})
		}
	})
}

// over fails the test unless a migration went over what it says, and said so.
func over(t *testing.T, rep appliance.Report, name, remark string) {
	t.Helper()
	if rep.Transport != name || !strings.Contains(strings.Join(rep.Remarks, "\n"), remark) {
		t.Errorf("it went over %s, %q; wanted %s, %q", rep.Transport, rep.Remarks, name, remark)
	}
}

// light is a program that checks itself and does little besides: the guest's processors
// are emulated.
func light(t *testing.T, r *rig) *guest {
	t.Helper()
	return r.small(t, r.a, "--only", "regs,memory", "--threads", "1", "--mem", "8", "--beat-us", "50000")
}

// patient allows a downtime that the guest keeps to.
func (g *guest) patient(mode string) appliance.MigrateRequest {
	req := g.request(mode)
	if mode == "precopy" || mode == "hybrid" {
		req.MaxDowntimeMS = 10000
	}
	return req
}

// testRDMARedis: a server under load goes there and back, in all modes, by one-sided
// reads, and leaves nothing in the kernel, in the daemons or pinned. Both hosts are in
// one network namespace, so it has another address on each.
func testRDMARedis(t *testing.T, r *rig) {
	hops := rdmaHops()
	g := r.server(t, r.a, "redis-server", "--port", strconv.Itoa(servicePort), "--bind", r.a.addr(), "--save", "", "--appendonly", "no",
		"--dir", t.TempDir(), "--protected-mode", "no", "--enable-debug-command", "yes")
	do := func(args ...string) string {
		c, err := r.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		v, err := testutil.NewRedisClient(c, 20*time.Second).Do(args...)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(v)
	}
	do("DEBUG", "POPULATE", "3000", "bulk", "4000")
	digest := do("DEBUG", "DIGEST")
	var before string
	stop := make(chan struct{})
	errs := make(chan error, 1)
	go func() { errs <- counting(r, stop) }()
	end := sync.OnceFunc(func() {
		close(stop)
		if err := <-errs; err != nil {
			t.Error(err)
		}
	})
	defer end()
	for i := range hops {
		req := g.patient(modes[i%len(modes)])
		req.Addresses = map[string]string{g.at.addr(): r.other(g.at).addr()}
		began := time.Now()
		rep := g.hopAs(req)
		over(t, rep, appliance.TransportRDMA, "read one-sided")
		t.Logf("%s: %.1f s, downtime %.0f ms, resident after %.0f ms; %q", req.Mode, time.Since(began).Seconds(), rep.DowntimeMS, rep.ResidentMS, rep.Remarks)
		if req.Mode == "postcopy" && rep.PagesOneSided < (rep.PagesTotal-rep.PagesZero)*3/4 {
			t.Errorf("of %d pages %d were read one-sided", rep.PagesTotal-rep.PagesZero, rep.PagesOneSided)
		}
		if i == 1 {
			before = held(t, r, g)
		}
	}
	testutil.Eventually(t, time.Minute, func() error {
		if now := held(t, r, g); now != before {
			return fmt.Errorf("after %d migrations:\n%s\nafter 2:\n%s", hops, now, before)
		}
		return nil
	})
	end()
	do("DEL", "count")
	if now := do("DEBUG", "DIGEST"); now != digest {
		t.Errorf("what nobody wrote to has changed: %s, it was %s", now, digest)
	}
	g.end()
	r.clean(t)
}

// rdmaHops is how often the server moves: 10 times, or what PAGEFERRY_RDMA_HOPS says.
func rdmaHops() int {
	if n, err := strconv.Atoi(os.Getenv("PAGEFERRY_RDMA_HOPS")); err == nil {
		return n
	}
	return 10
}

// counting counts in a server until stop, and compares every answer: an
// acknowledged write must never be lost.
func counting(r *rig, stop <-chan struct{}) error {
	var least, n int64
	var c net.Conn
	for {
		select {
		case <-stop:
			if n < 50 {
				return fmt.Errorf("only %d writes were acknowledged", n)
			}
			return nil
		default:
		}
		if c == nil {
			conn, err := r.dial(context.Background())
			if err != nil {
				time.Sleep(5 * time.Millisecond)
				continue
			}
			c = conn
		}
		v, err := testutil.NewRedisClient(c, 10*time.Second).Do("INCR", "count")
		if err != nil {
			c.Close()
			c = nil
			least++ // it may have been carried out
			continue
		}
		got, ok := v.(int64)
		if !ok || got <= n || got > n+1+least {
			return fmt.Errorf("count is %v after %d was acknowledged, with %d answers that never came", v, n, least)
		}
		n, least = got, 0
	}
}

// held is what there is of queue pairs and memory regions, of descriptors of the
// daemons, and of pinned pages of the guest.
func held(t *testing.T, r *rig, g *guest) string {
	t.Helper()
	var b strings.Builder
	list, err := netlink.RdmaResourceList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range list {
		fmt.Fprintln(&b, l.Name, l.RdmaResourceSummaryEntries)
	}
	for _, n := range r.nodes() {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.daemon.Load().PID()))
		if err != nil {
			t.Fatal(err)
		}
		uverbs := 0
		for _, fd := range fds {
			if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", n.daemon.Load().PID(), fd.Name())); strings.Contains(to, "infiniband") {
				uverbs++
			}
		}
		fmt.Fprintf(&b, "%s: %d uverbs\n", n.name(), uverbs)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.outer()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmPin") || strings.HasPrefix(line, "VmLck") {
			b.WriteString(line)
		}
	}
	return b.String()
}
