package survive_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
)

// pagers lists the pagers of the host, and their keepers.
func (n *node) pagers() (pagers, keepers []int) {
	daemon := n.daemon.Load().PID()
	for _, p := range n.processes() {
		if p.pid == daemon {
			continue
		}
		// Of our own binary only: to ask an arriving process may block.
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.pid)); err != nil || filepath.Base(exe) != "pageferry" {
			continue
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		switch words := strings.Split(string(b), "\x00"); {
		case len(words) > 1 && words[1] == "pager":
			pagers = append(pagers, p.pid)
		case strings.Contains(string(b), "keeper"):
			keepers = append(keepers, p.pid)
		}
	}
	return pagers, keepers
}

// killPagers kills the pagers of the host and returns how many there were.
func (n *node) killPagers() int { return n.signalPagers(unix.SIGKILL) }

func (n *node) signalPagers(sig unix.Signal) int {
	n.r.killed.Store(true)
	ps, _ := n.pagers()
	for _, p := range ps {
		if fd, err := unix.PidfdOpen(p, 0); err == nil {
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
			_ = unix.Close(fd)
		}
	}
	return len(ps)
}

// disturb moves the guest and has f called when side passes point. It returns
// how the source says that it went; how it goes on is for the caller to say.
func (g *guest) disturb(t *testing.T, mode string, s side, point string, f func()) appliance.Report {
	t.Helper()
	return g.disturbAt(t, g.request(mode), moment{s, point, 1, 0}, f)
}

// disturbAt is disturb at any moment. Where the rounds end by themselves before that
// of the moment, because a busy machine wrote less or carried more than expected, it
// begins again.
func (g *guest) disturbAt(t *testing.T, req appliance.MigrateRequest, m moment, f func()) appliance.Report {
	t.Helper()
	for range 5 {
		if rep, reached := g.tryDisturbAt(t, req, m, f); reached {
			return rep
		} else if strings.Contains(rep.Reason, "try again") {
			t.Logf("%v was not passed: %s", m, rep.Reason) // a thread that waits in the kernel: people are told the same
		} else if m.round == 0 || rep.Outcome != appliance.OutcomeFailed {
			t.Fatalf("%v was not passed: %s %s", m, rep.Outcome, rep.Reason)
		} else {
			t.Logf("%v was not passed: %s", m, rep.Reason)
		}
	}
	t.Fatalf("%v was never passed", m)
	return appliance.Report{}
}

func (g *guest) tryDisturbAt(t *testing.T, req appliance.MigrateRequest, m moment, f func()) (_ appliance.Report, reached bool) {
	t.Helper()
	began := time.Now()
	from, to := g.at, g.r.other(g.at)
	n := from
	if m.side == destination {
		n = to
	}
	at := n.points.at(m, f)
	id, err := g.begin(req)
	if err != nil {
		t.Fatal(err)
	}
	ended := time.NewTicker(100 * time.Millisecond)
	defer ended.Stop()
	for limit := time.After(patience(20 * time.Second)); !reached; {
		select {
		case <-at:
			reached = true
		case <-limit:
			t.Fatalf("%v was not passed", m)
		case <-ended.C:
			if rep, ok := g.reportOf(from, id); ok && rep.Outcome != "" {
				select {
				case <-at:
					reached = true
				default:
					from.points.do(nil)
					to.points.do(nil)
					return rep, false
				}
			}
		}
	}
	from.points.do(nil)
	to.points.do(nil)
	for _, n := range []*node{from, to} {
		if n.killed() {
			n.start(t)
		}
	}
	g.survived(t, began)
	rep, ok := g.reportOf(from, id)
	if !ok {
		t.Fatalf("host %s does not know of migration %s", from.name(), id)
	}
	return rep, true
}

// reportOf is what a host that runs says of a migration.
func (g *guest) reportOf(n *node, id string) (appliance.Report, bool) {
	reps, err := n.list()
	if err != nil {
		return appliance.Report{}, false
	}
	i := slices.IndexFunc(reps, func(r appliance.Report) bool { return r.ID == id })
	if i < 0 {
		return appliance.Report{}, false
	}
	return reps[i], true
}

// The pager is killed, and daemon and pager together, from the moment that it is
// there to the last page: a new one takes over from the keeper, or the migration
// is given up, and the program lives on.
func TestKilledPager(t *testing.T) { killedPagers(t, "") }

func killedPagers(t *testing.T, trap string) {
	begin(t)
	r, top := newRig(t), t
	small := func() *guest {
		g := r.small(top, r.a, "--mem", "48", "--veiled", "--sigcont-ok") // much is missing for a while
		g.trap = trap
		return g
	}
	g := small()
	for _, point := range []string{
		"destination/engine/prepare/after",
		"destination/send/accept/after",
		"destination/recv/state",
		"restore/trap/after",
		"restore/descriptors/after",
		"destination/engine/rebuild/after",
		"destination/journal/ready/after",
		"destination/recv/commit",
		"destination/journal/committed/after",
		"destination/engine/release/after",
		"destination/journal/running/before",
		"destination/journal/running/after",
		"destination/engine/fetch/before",
		"destination/engine/fetch/after",
		"destination/engine/resident/before",
	} {
		for _, daemon := range []bool{false, true} {
			name := point + ", pager"
			if daemon {
				name = point + ", pager and daemon"
			}
			top.Run(name, func(t *testing.T) {
				if r.broken {
					r = newRig(top)
					g = small()
				}
				r.watch(t)
				g.t = t
				defer func() { g.t = top }()
				killed := 0
				to := r.other(g.at)
				rep := g.disturb(t, "postcopy", destination, point, func() {
					if daemon {
						// Stopped, it cannot put another in the pager's place.
						_ = to.daemon.Load().Signal(unix.SIGSTOP)
					}
					killed = to.killPagers()
					if daemon {
						to.kill()
					}
				})
				if killed != 1 && point != "destination/engine/resident/before" {
					t.Errorf("%d pagers were there to be killed", killed)
				}
				t.Logf("%s %s", rep.Outcome, rep.Reason)
				if committed(point) && rep.Outcome != appliance.OutcomeDone {
					t.Errorf("it was committed, and then %s: %s", rep.Outcome, rep.Reason)
				}
			})
		}
	}
	g.verify()
	r.clean(t)
}

// Every pager that takes over is killed at once, for a while: one that may live takes over
// in the end, also where nobody asks anything of it.
func TestKilledTakeover(t *testing.T) {
	begin(t)
	r := newRig(t)
	g := r.small(t, r.a, "--mem", "48", "--veiled", "--sigcont-ok")
	for _, point := range []string{"destination/journal/running/after", "destination/engine/fetch/before"} {
		r.watch(t)
		to := r.other(g.at)
		killed := 0
		done := make(chan struct{})
		rep := g.disturb(t, "postcopy", destination, point, func() {
			go func() {
				defer close(done)
				for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
					killed += to.killPagers()
				}
			}()
		})
		<-done
		t.Logf("%d pagers killed: %s %s", killed, rep.Outcome, rep.Reason)
		if rep.Outcome != appliance.OutcomeDone || killed < 2 {
			t.Errorf("%s after %d pagers killed: %s", rep.Outcome, killed, rep.Reason)
		}
	}
	g.verify()
	r.clean(t)
}

// committed reports whether a point lies behind the source's commit.
func committed(point string) bool {
	for _, s := range []string{"recv/commit", "journal/committed", "engine/release", "journal/running", "engine/fetch", "engine/resident"} {
		if strings.Contains(point, s) {
			return true
		}
	}
	return false
}

// cut closes every TCP connection between the hosts, as a middlebox does that
// forgets them: SOCK_DESTROY at one end, and a reset for the other.
func (n *node) cut() error {
	return n.host.Inside(func() error {
		socks, err := netlink.SocketDiagTCP(unix.AF_INET)
		if err != nil {
			return err
		}
		var errs []error
		for _, s := range socks {
			if s.ID.Destination.Equal(net.IP(n.r.other(n).host.Addr().AsSlice())) {
				err := netlink.SocketDestroy(
					&net.TCPAddr{IP: s.ID.Source, Port: int(s.ID.SourcePort)},
					&net.TCPAddr{IP: s.ID.Destination, Port: int(s.ID.DestinationPort)})
				if !errors.Is(err, unix.ENOENT) { // closed since it was listed
					errs = append(errs, err)
				}
			}
		}
		return errors.Join(errs...)
	})
}

// link takes the link between the hosts down or up.
func (n *node) link(up bool) error {
	other := n.r.other(n)
	return n.host.Inside(func() error {
		l, err := netlink.LinkByName("to-" + other.name())
		if err != nil {
			return err
		}
		if !up {
			return netlink.LinkSetDown(l)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		// The route has gone with the link.
		dst := &net.IPNet{IP: net.IP(other.host.Addr().AsSlice()), Mask: net.CIDRMask(32, 32)}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst,
			Src: net.IP(n.host.Addr().AsSlice()), Scope: netlink.SCOPE_LINK})
	})
}

// linkPoints are the states in which a link can break.
var linkPoints = []struct {
	side  side
	point string
}{
	{source, "source/dial/after"},
	{source, "source/send/offer/after"},
	{source, "source/recv/accept"},
	{source, "source/engine/open/after"},
	{source, "source/engine/freeze/after"},
	{source, "source/send/state/after"},
	{destination, "destination/recv/state"},
	{destination, "restore/trap/after"},
	{destination, "destination/journal/ready/after"},
	{source, "source/recv/ready"},
	{source, "source/engine/hold/after"},
	{source, "source/journal/committed/after"},
	{source, "source/send/commit/after"},
	{destination, "destination/recv/commit"},
	{destination, "destination/journal/running/after"},
	{destination, "destination/engine/fetch/after"},
	{source, "source/recv/running"},
	{source, "source/journal/resident/after"},
	{source, "source/send/done/before"},
}

// Every connection is reset, in every state.
func TestLinkCut(t *testing.T) {
	begin(t)
	r, top := newRig(t), t
	g := r.small(t, r.a)
	for _, p := range linkPoints {
		for _, mode := range []string{"postcopy", "stop"} {
			top.Run(p.point+", "+mode, func(t *testing.T) {
				if r.broken {
					r = newRig(top)
					g = r.small(top, r.a)
				}
				r.watch(t)
				g.t = t
				defer func() { g.t = top }()
				at := g.at
				rep := g.disturb(t, mode, p.side, p.point, func() {
					if err := at.cut(); err != nil {
						t.Error(err)
					}
				})
				t.Logf("%s %s", rep.Outcome, rep.Reason)
			})
		}
	}
	g.verify()
	r.clean(t)
}

// The link is down for longer than a peer may be silent, and comes back. All
// states at once, each in hosts of its own: it is waiting for the most part.
func TestLinkStalled(t *testing.T) {
	begin(t)
	const down = 6 * time.Second // peers give up after 5 s
	const atOnce = 4
	type stall struct {
		g    *guest
		name string
		p    int
	}
	var wg sync.WaitGroup
	next := make(chan int, len(linkPoints))
	for i := range linkPoints {
		next <- i
	}
	close(next)
	for range atOnce {
		r := newRig(t)
		g := r.small(t, r.a)
		wg.Go(func() {
			for i := range next {
				p := linkPoints[i]
				if r.broken {
					return
				}
				t.Run(p.point, func(t *testing.T) {
					r.watch(t)
					g.t = t
					at := g.at
					up := make(chan struct{})
					rep := g.disturb(t, []string{"postcopy", "stop"}[i%2], p.side, p.point, func() {
						if err := at.link(false); err != nil {
							t.Error(err)
						}
						time.AfterFunc(down, func() {
							defer close(up)
							if err := at.link(true); err != nil {
								t.Error(err)
							}
						})
					})
					<-up
					t.Logf("%s %s", rep.Outcome, rep.Reason)
				})
			}
			g.t = t
			if !r.broken {
				g.verify()
				r.clean(t)
			}
		})
	}
	wg.Wait()
}
