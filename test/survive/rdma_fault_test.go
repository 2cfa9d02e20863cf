package survive_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// testRDMADisturbed: who serves it is killed, packets are lost, a device is removed.
func testRDMADisturbed(t *testing.T, r *rig) {
	g := light(t, r)
	const switched, rebuilt = "destination/journal/committed/after", "destination/engine/rebuild/after"
	moves := 0
	for _, c := range []struct {
		name  string
		point string
		f     func(from, to *node)
		over  string // what it goes over in the end
	}{
		{"pager", switched, func(_, to *node) { to.r.killed.Store(true); to.killPagers() }, appliance.TransportRDMA},
		{"pager before the switch", rebuilt, func(_, to *node) { to.r.killed.Store(true); to.killPagers() }, ""},
		{"destination", switched, func(_, to *node) { to.kill() }, appliance.TransportRDMA},
		{"source", switched, func(from, _ *node) { from.kill() }, appliance.TransportRDMA},
		{"source before the switch", rebuilt, func(from, _ *node) { from.kill() }, ""},
		{"packets", switched, func(_, _ *node) { lose(t, time.Second) }, appliance.TransportRDMA},
		{"device", switched, func(from, _ *node) { remove(t, from) }, appliance.TransportTCP},
		{"device before the switch", rebuilt, func(from, _ *node) { remove(t, from) }, ""},
	} {
		from, to := g.at, r.other(g.at)
		rep := g.disturb(t, "postcopy", destination, c.point, func() { c.f(from, to) })
		t.Logf("%s: %s %s; %s %q", c.name, rep.Outcome, rep.Reason, rep.Transport, rep.Remarks)
		if c.over != "" && (rep.Outcome != appliance.OutcomeDone || rep.Transport != c.over) {
			t.Errorf("%s: %s over %s, wanted it done over %s: %s", c.name, rep.Outcome, rep.Transport, c.over, rep.Reason)
		}
		moves++
		restore(t)
		g.beat(2)
	}
	g.oneOwner(moves)
	g.verify()
	r.clean(t)
}

// cable are the network devices of vmtest.Pair and their RDMA devices.
var cable = map[string]string{"va": "rxea", "vb": "rxeb"}

// lose has the cable lose everything for a while.
func lose(t *testing.T, d time.Duration) {
	var all []*netlink.Netem
	for dev := range cable {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			t.Error(err)
			return
		}
		q := netlink.NewNetem(netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			netlink.NetemQdiscAttrs{Loss: 100})
		if err := netlink.QdiscAdd(q); err != nil {
			t.Error(err)
		}
		all = append(all, q)
	}
	time.AfterFunc(d, func() {
		for _, q := range all {
			if err := netlink.QdiscDel(q); err != nil {
				t.Error(err)
			}
		}
	})
}

// remove takes a host's RDMA device away, for which the kernel waits until nobody
// has it open.
func remove(t *testing.T, n *node) {
	for dev, name := range cable {
		if link, err := netlink.LinkByName(dev); err != nil || !has(link, n.addr()) {
			continue
		}
		go func() {
			if err := netlink.RdmaLinkDel(name); err != nil {
				t.Error(err)
			}
		}()
	}
}

func has(link netlink.Link, addr string) bool {
	all, _ := netlink.AddrList(link, netlink.FAMILY_V4)
	for _, a := range all {
		if a.IP.String() == addr {
			return true
		}
	}
	return false
}

// restore makes devices anew that remove took.
func restore(t *testing.T) {
	t.Helper()
	for dev, name := range cable {
		testutil.Eventually(t, 20*time.Second, func() error {
			_, err := netlink.RdmaLinkByName(name)
			if err == nil {
				_, err = os.Stat("/sys/class/infiniband/" + name + "/ports/1/gids/1")
			}
			if err != nil {
				err = errors.Join(err, netlink.RdmaLinkAdd(name, "rxe", dev))
			}
			return err
		})
	}
}

// testRDMANotHere: where it cannot be had it is TCP, and the report says why; who
// insists is refused.
func testRDMANotHere(t *testing.T, r *rig) {
	g := light(t, r)
	const lib = "for f in /usr/lib/*/libibverbs.so.1; do %s $f; done"
	shell := func(how string) {
		if out, err := r.a.shell(fmt.Sprintf(lib, how)); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		r.a.restart(t)
	}
	shell("mount --bind /dev/null")
	for range 2 { // the source lacks the library, then the destination
		req := g.request("stop")
		req.Transport = appliance.TransportRDMA
		if rep, err := g.migrate(req); err == nil && rep.Outcome == appliance.OutcomeDone {
			t.Fatalf("host a lacks the library, and it went from host %s over %s", g.at.name(), rep.Transport)
		} else if why := fmt.Sprint(err, rep.Reason); !strings.Contains(why, "libibverbs") {
			t.Errorf("from host %s it was refused for %s", g.at.name(), why)
		}
		over(t, g.hop("postcopy"), appliance.TransportTCP, "libibverbs")
	}
	shell("umount")
	// The source may not lock as much memory as lanes take.
	r.a.limits = []string{"setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--inh-caps=-ipc_lock,-sys_resource", "prlimit", "--memlock=65536:65536"}
	r.a.restart(t)
	over(t, g.hop("postcopy"), appliance.TransportTCP, "ulimit -l")
	r.a.limits = nil
	r.a.restart(t)
	req := g.request("stop")
	req.Transport = appliance.TransportTCP
	over(t, g.hopAs(req), appliance.TransportTCP, "")
	g.verify()
	r.clean(t)
}

// testRDMASoft: devices are made where there are none, and taken away again.
func testRDMASoft(t *testing.T, r *rig) {
	for _, name := range cable {
		if err := netlink.RdmaLinkDel(name); err != nil {
			t.Fatal(err)
		}
	}
	defer restore(t)
	g, h := light(t, r), light(t, r)
	// The guest may be too slow for the lanes' handshake: then it is TCP, and they move on.
	for try := 1; ; try++ {
		reps := bothAtOnce(t, r, g, h)
		late := func(rep appliance.Report) bool {
			return rep.Transport == appliance.TransportTCP && strings.Contains(strings.Join(rep.Remarks, "\n"), "deadline exceeded")
		}
		if try < 4 && (late(reps[0]) || late(reps[1])) {
			t.Logf("once more: %q %q", reps[0].Remarks, reps[1].Remarks)
			continue
		}
		for _, rep := range reps {
			over(t, rep, appliance.TransportRDMA, "soft-RoCE device pf_v")
		}
		break
	}
	gone := func() error {
		list, err := netlink.RdmaLinkList()
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("there is %s", list[0].Attrs.Name)
		}
		return err
	}
	testutil.Eventually(t, 30*time.Second, gone)
	h.verify()
	// What a killed daemon leaves the next one takes away.
	rep := g.disturb(t, "postcopy", source, "source/engine/freeze/after", func() { g.at.kill() })
	t.Logf("%s %s", rep.Outcome, rep.Reason)
	testutil.Eventually(t, 30*time.Second, gone)
	g.verify()
	r.clean(t)
}

// bothAtOnce moves two programs at one time from where they are to the other host; two at
// once share its devices.
func bothAtOnce(t *testing.T, r *rig, gs ...*guest) []appliance.Report {
	t.Helper()
	reps, errs := make([]appliance.Report, len(gs)), make([]error, len(gs))
	var all sync.WaitGroup
	for i, p := range gs {
		all.Go(func() { reps[i], errs[i] = p.migrate(p.request("postcopy")) })
	}
	all.Wait()
	for i, p := range gs {
		if errs[i] != nil || reps[i].Outcome != appliance.OutcomeDone {
			t.Fatalf("%v, %s: %s", errs[i], reps[i].Outcome, reps[i].Reason)
		}
		p.at, p.pid = r.other(p.at), reps[i].DestPID
	}
	return reps
}
