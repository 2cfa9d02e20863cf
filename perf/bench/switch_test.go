package bench

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// BenchmarkSwitch is how long a program stands still when it moves: as a client
// of it sees it (redis), as it sees itself (workload), as somebody outside sees
// its heartbeats (threads), and as the daemon reports it.
func BenchmarkSwitch(b *testing.B) { runAll(b, switches) }

func switches(s scale) (list []benchmark) {
	for _, size := range s.redis {
		list = append(list, benchmark{"redis-" + sizeName(size), func(m *meter) { switchRedis(m, size) }})
	}
	return append(append(list, sizes(s)...),
		benchmark{"workload-" + sizeName(s.gap), func(m *meter) { switchWorkload(m, s.gap, 1) }},
		benchmark{fmt.Sprintf("threads-%d", s.threads), switchThreads},
		benchmark{fmt.Sprintf("workload-threads-%d", s.threads), func(m *meter) { switchWorkload(m, uint64(s.threads)*mib/4, s.threads) }},
	)
}

// warm waits until the client is at work.
func (m *meter) warm(c *Client) {
	m.Helper()
	for range 500 {
		r, err := c.Take()
		m.must(err)
		if r.Answers >= 10 {
			return
		}
		time.Sleep(20 * time.Millisecond) // the time in which it can answer
	}
	m.Fatal("the client gets no answers")
}

func switchRedis(m *meter, size uint64) {
	st := m.stage(false)
	g, keys, err := st.Redis(m.ctx, size)
	m.must(err)
	c, err := st.NewClient(keys)
	m.must(err)
	m.closing(c.Close)
	var client, daemon []time.Duration
	for m.loop() {
		m.warm(c)
		h := m.move(st, g, "postcopy")
		m.warmed(c, &client)
		daemon = append(daemon, h.Downtime())
	}
	m.report(MS(Median(client)), "client-ms")
	m.report(MS(Quantile(client, 1)), "client-max-ms")
	m.report(MS(Median(daemon)), "daemon-ms")
	m.keep("client", size, MS(Median(client)))
	m.keep("daemon", size, MS(Median(daemon)))
	switch size {
	case 2 * GiB:
		m.judge(Row{What: "redis 2 GiB, client's longest gap", Target: 30, Got: MS(Median(client)), Unit: "ms"})
		m.judge(Row{What: "redis 2 GiB, freeze to running by the daemon", Target: 30, Got: MS(Median(daemon)), Unit: "ms"})
	case 4 * GiB:
		m.judgeGrowth("client", "client's longest gap")
		m.judgeGrowth("daemon", "freeze to running")
	}
}

// warmed takes what the client saw of a move, once it works again.
func (m *meter) warmed(c *Client, gaps *[]time.Duration) {
	m.Helper()
	r, err := c.Take()
	m.must(err)
	gap := r.Gap
	for tries := 0; r.Answers == 0; tries++ {
		if tries == 500 {
			m.Fatal("the client gets no answers after a move")
		}
		time.Sleep(10 * time.Millisecond) // the time in which it can answer
		r, err = c.Take()
		m.must(err)
		gap += r.Gap // one gap in two reports
	}
	*gaps = append(*gaps, gap)
}

func growthKey(what string, size uint64) string { return what + " " + sizeName(size) }

func (m *meter) keep(what string, size uint64, v float64) {
	book.mu.Lock()
	defer book.mu.Unlock()
	book.medians[growthKey(what, size)] = v
}

// remember keeps a median for later benchmarks of the run, recall gives it back; 0
// where there is none.
func (m *meter) remember(what string, v float64) {
	book.mu.Lock()
	defer book.mu.Unlock()
	book.medians[what] = v
}

func (m *meter) recall(what string) float64 {
	book.mu.Lock()
	defer book.mu.Unlock()
	return book.medians[what]
}

// judgeGrowth compares 4 GiB with 1 GiB.
func (m *meter) judgeGrowth(key, what string) {
	book.mu.Lock()
	one, four := book.medians[growthKey(key, GiB)], book.medians[growthKey(key, 4*GiB)]
	book.mu.Unlock()
	if one == 0 {
		return // the smaller one was not asked for
	}
	m.report(four/one, key+"-4GiB/1GiB")
	m.judge(Row{What: "redis 4 GiB to 1 GiB, " + what, Target: 1.2, Got: four / one, Of: fmt.Sprintf("%.1f ms / %.1f ms", four, one)})
}

func switchWorkload(m *meter, size uint64, threads int) {
	st := m.stage(false)
	g, err := st.Workload(m.ctx, size, "--threads", strconv.Itoa(threads))
	m.must(err)
	var own, daemon []time.Duration
	_, at, err := g.OwnGap(m.ctx, 0)
	m.must(err)
	for m.loop() {
		h := m.move(st, g, "postcopy")
		var gap time.Duration
		gap, at, err = g.OwnGap(m.ctx, at)
		m.must(err)
		own, daemon = append(own, gap), append(daemon, h.Downtime())
	}
	m.report(MS(Median(own)), "own-ms")
	m.report(MS(Quantile(own, 1)), "own-max-ms")
	m.report(MS(Median(daemon)), "daemon-ms")
	switch {
	case threads >= 200:
		m.judge(Row{What: fmt.Sprintf("workload with %d threads, its own longest gap", threads), Target: 80, Got: MS(Median(own)), Unit: "ms"})
	case size == 2*GiB:
		m.judge(Row{What: "workload 2 GiB, its own longest gap", Target: 30, Got: MS(Median(own)), Unit: "ms"})
	}
}

// switchThreads moves a C program with many threads, each of which checks its
// registers; the gap is that between its heartbeats, one a millisecond.
func switchThreads(m *meter) {
	st := m.stage(false)
	beats, err := NewBeats(testutil.Socket(m, "beats"))
	m.must(err)
	m.closing(beats.Close)
	g, p, err := st.Start(testutil.CC(m, "everything"), "--only", "regs", "--threads", strconv.Itoa(m.threads),
		"--heartbeat", beats.Address, "--beat-us", "1000", "--identity", "bench")
	m.must(err)
	m.must(g.said(m.ctx, p, "ready", time.Minute))
	var seen, daemon []time.Duration
	for m.loop() {
		m.must(beats.Wait(m.ctx, 20))
		beats.Take()
		h := m.move(st, g, "postcopy")
		gap, n := beats.Take()
		for n == 0 {
			m.must(beats.Wait(m.ctx, 1))
			var more time.Duration
			more, n = beats.Take()
			gap += more // one gap in two parts
		}
		seen, daemon = append(seen, gap), append(daemon, h.Downtime())
	}
	if text, err := g.output(); err != nil || strings.Contains(string(text), "bad") {
		m.Fatalf("the program found something wrong: %v %s", err, text)
	}
	m.report(MS(Median(seen)), "beats-ms")
	m.report(MS(Quantile(seen, 1)), "beats-max-ms")
	m.report(MS(Median(daemon)), "daemon-ms")
	if m.threads >= 200 {
		m.judge(Row{What: fmt.Sprintf("%d threads, longest time without a heartbeat", m.threads), Target: 80, Got: MS(Median(seen)), Unit: "ms"})
		m.judge(Row{What: fmt.Sprintf("%d threads, freeze to running by the daemon", m.threads), Target: 80, Got: MS(Median(daemon)), Unit: "ms"})
	}
}
