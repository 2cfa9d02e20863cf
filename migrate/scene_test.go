package migrate

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// scene is a world whose daemons the test itself starts and kills, step by step,
// in virtual time.
type scene struct {
	*world
	t    *testing.T
	dest *Destination
}

// stage runs f on a scene with a destination that listens.
func stage(t *testing.T, mode Mode, f func(t *testing.T, s *scene)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &scene{world: newWorld(1, mode), t: t}
		defer func() { // also after Fatal
			for _, l := range s.lives {
				l.crash()
			}
		}()
		s.startDest()
		f(t, s)
		s.stopDest()
		if t.Failed() {
			t.Logf("what happened:\n%s", s.dump())
		}
	})
}

func (s *scene) startDest() {
	l := s.start(RoleDestination)
	d, err := NewDestination(DestinationConfig{
		Host: &fakeHost{l}, Journals: &fakeJournals{l, s.disks[RoleDestination]}, Hello: Hello{PageSize: 4096, Host: "b"},
		KillPoint: l.point,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	context.AfterFunc(l.ctx, d.cancel)
	if err := d.Recover(l.ctx); err != nil {
		s.t.Fatal(err)
	}
	s.dest = d
	accept := make(chan *fakeLane, 8)
	s.mu.Lock()
	l.accept = accept
	s.mu.Unlock()
	go func() {
		for {
			select {
			case lane := <-accept:
				go func() { _ = d.Serve(l.ctx, lane, transport.Peer{Name: "a"}) }()
			case <-l.ctx.Done():
				return
			}
		}
	}()
}

func (s *scene) stopDest() {
	l := s.lives[RoleDestination]
	if !s.isDead(l) {
		if err := s.dest.Close(); err != nil {
			s.t.Error(err)
		}
	}
	l.cancel()
	synctest.Wait()
}

// outcome is what a source's goroutine came to.
type outcome struct {
	res Result
	err error
}

// begin starts f, a method of src; the channel is closed without a value if the
// daemon is killed.
func (s *scene) begin(l *life, f func(context.Context) (Result, error)) <-chan outcome {
	ch := make(chan outcome, 1)
	go func() {
		defer close(ch)
		res, err := f(l.ctx)
		l.here()
		ch <- outcome{res, err}
	}()
	return ch
}

func (s *scene) newLife() (*life, *Source) {
	l := s.start(RoleSource)
	return l, s.newSource(l)
}

func (s *scene) await(ch <-chan outcome) outcome {
	s.t.Helper()
	select {
	case o, ok := <-ch:
		if !ok {
			s.t.Fatalf("the source was killed\n%s", s.dump())
		}
		return o
	case <-time.After(time.Hour):
		s.t.Fatalf("no end\n%s", s.dump())
	}
	return outcome{}
}

func (s *scene) want(src, dst copyState) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.src != src || s.dst != dst {
		s.t.Errorf("source's copy %v, destination's %v; want %v, %v", s.src, s.dst, src, dst)
	}
}

// until lets virtual time pass until the destination is st.
func (s *scene) until(st DestState) {
	s.t.Helper()
	for range 1000 {
		if a := s.dest.find(modelID); a != nil && a.State() == st {
			return
		}
		time.Sleep(time.Millisecond)
	}
	s.t.Fatalf("the destination is never %v\n%s", st, s.dump())
}

// at plans faults.
func (s *scene) at(what fault, points ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range points {
		s.plan = append(s.plan, planned{p, what})
	}
}

func (s *scene) block(on bool) {
	s.mu.Lock()
	s.blocked = on
	s.mu.Unlock()
	if on {
		s.breakLinks(false)
	}
}
