package survive_test

import (
	"bufio"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

// points is where a daemon reports its kill points.
type points struct {
	path string
	l    *net.UnixListener
	wg   sync.WaitGroup

	mu   sync.Mutex
	act  func(point string) // called with every point; the daemon waits for it
	seen []string           // since do
}

func newPoints(t testing.TB) *points {
	t.Helper()
	p := &points{path: testutil.Socket(t, "points")}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	p.l = l
	p.wg.Go(p.run)
	t.Cleanup(func() {
		_ = l.Close()
		p.wg.Wait()
	})
	return p
}

func (p *points) run() {
	for {
		c, err := p.l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		p.wg.Go(func() {
			defer c.Close()
			line, err := bufio.NewReader(c).ReadString('\n')
			if err != nil {
				return // killed meanwhile
			}
			point := strings.TrimSpace(line)
			p.mu.Lock()
			act := p.act
			p.seen = append(p.seen, point)
			p.mu.Unlock()
			if act != nil {
				act(point)
			}
		})
	}
}

// do has act called with every point from now on, nil for nothing, and forgets
// which were seen. A daemon stands still at the point until act returns.
func (p *points) do(act func(point string)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.act, p.seen = act, nil
}

// passed lists the points that were passed since do, in order.
func (p *points) passed() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.seen...)
}

// at has f called at a moment; m.side is whose points these are.
func (p *points) at(m moment, f func()) (reached <-chan struct{}) {
	done := make(chan struct{})
	var mu sync.Mutex
	n, round := 0, 1
	p.do(func(s string) {
		mu.Lock()
		hit := false
		if s == m.point && (m.round == 0 || m.round == round) {
			n++
			hit = n == m.nth
		}
		if s == roundEnds[m.side] {
			round++
		}
		mu.Unlock()
		if hit {
			f()
			close(done)
		}
	})
	return done
}
