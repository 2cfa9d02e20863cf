package survive_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// veilModes are those in which pages are missing while the program runs.
var veilModes = []string{"postcopy", "hybrid", "hybrid", "postcopy"}

// veiledHops is how often each program is moved whose memory is shown by a file.
const veiledHops = 20

// hopBehindTheVeil moves the guest that often.
func (g *guest) hopBehindTheVeil(t *testing.T, between func()) {
	t.Helper()
	g.trap = "fuse"
	var slowest float64
	for i := range veiledHops {
		slowest = max(slowest, g.hop(veilModes[i%len(veilModes)]).DowntimeMS)
		if between != nil {
			between()
		}
	}
	t.Logf("%d hops: downtime %.1f ms at most", veiledHops, slowest)
}

// Programs whose anonymous memory is shown by a file while it arrives go there and
// back, and never see a difference.
func TestHopsBehindTheVeil(t *testing.T) {
	begin(t)
	free := make(chan *rig, rigs) // side by side: most of a hop is waiting
	for range rigs {
		free <- newRig(t)
	}
	var wg sync.WaitGroup
	for name, args := range veiledGuests(t) {
		r := <-free
		wg.Go(func() {
			r := r.whole(t)
			t.Run(name, func(t *testing.T) {
				r.watch(t)
				g := r.selfChecking(t, r.a, args...)
				g.hopBehindTheVeil(t, func() { g.beat(2) })
				g.oneOwner(veiledHops)
				g.verify()
				r.clean(t)
			})
			free <- r
		})
	}
	wg.Wait()
}

// So do servers, while clients write and check every answer.
func TestHopsOfServersBehindTheVeil(t *testing.T) {
	begin(t)
	r := newRig(t)
	t.Run("redis", func(t *testing.T) {
		r.watch(t)
		g := r.redis(t)
		// Beside the clients memory is taken and given back, to the kernel as well.
		churn := func() {
			c, err := r.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			do := testutil.NewRedisClient(c, 20*time.Second)
			for _, cmd := range [][]string{{"SELECT", "1"}, {"FLUSHDB"}, {"MEMORY", "PURGE"}, {"DEBUG", "POPULATE", "3000", "bulk", "4000"}} {
				if _, err := do.Do(cmd...); err != nil {
					t.Errorf("%v: %v", cmd, err)
				}
			}
		}
		withClients(t, r, func(c net.Conn) session { return redisSession{testutil.NewRedisClient(c, 10*time.Second)} },
			func() { g.hopBehindTheVeil(t, churn) })
		g.end()
		r.clean(t)
	})
	t.Run("memcached", func(t *testing.T) {
		r.watch(t)
		g := r.memcached(t)
		withClients(t, r, func(c net.Conn) session { return memcachedSession{c} }, func() { g.hopBehindTheVeil(t, nil) })
		g.end()
		r.clean(t)
	})
}

// The pager is killed where memory is shown by a file that it serves.
func TestKilledPagerBehindTheVeil(t *testing.T) { killedPagers(t, "fuse") }

// The daemon is killed in a stop in which mappings are about to be replaced, and stays
// away: the program goes on with them as they are.
func TestKilledSettlerBehindTheVeil(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	for _, name := range []string{"sparse", "halves"} {
		g := r.selfChecking(t, r.a, veiledGuests(t)[name]...)
		g.trap = "fuse"
		sc := plain
		sc.away = 500 * time.Millisecond
		for i, point := range []string{"settle-copy", "settle-copied", "settle-early", "settle-copy", "gate-running", "settle-copied"} {
			g.killAt(t, sc, veilModes[i%len(veilModes)], moment{side: destination, point: "inject/" + point, nth: 1 + i%2})
		}
		g.verify()
	}
	r.clean(t)
}
