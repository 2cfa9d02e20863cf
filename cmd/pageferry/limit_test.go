package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport/pace"
)

// shaper reads what the kernel's shaper on the link of a host has let pass,
// headers of packets included.
type shaper struct {
	handle *netlink.Handle
	link   netlink.Link

	samples []passed
	stop    chan struct{}
	done    chan error
}

type passed struct {
	before, after time.Time
	bytes         uint64
}

func (h *twoHosts) shaper(name, device string) *shaper {
	h.t.Helper()
	ns, err := netns.GetFromPid(h.daemons[name].PID())
	if err != nil {
		h.t.Fatal(err)
	}
	defer ns.Close()
	s := &shaper{stop: make(chan struct{}), done: make(chan error, 1)}
	if s.handle, err = netlink.NewHandleAt(ns); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(s.handle.Close)
	if s.link, err = s.handle.LinkByName(device); err != nil {
		h.t.Fatal(err)
	}
	go func() { s.done <- s.run() }()
	return s
}

func (s *shaper) run() error {
	for {
		p := passed{before: time.Now()}
		qs, err := s.handle.QdiscList(s.link)
		if err != nil {
			return err
		}
		for _, q := range qs {
			if st := q.Attrs().Statistics; q.Type() == "tbf" && st != nil && st.Basic != nil {
				p.bytes = st.Basic.Bytes
			}
		}
		p.after = time.Now()
		s.samples = append(s.samples, p)
		select {
		case <-s.stop:
			return nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// end returns all bytes, and the most in any second.
func (s *shaper) end() (all, most uint64, err error) {
	close(s.stop)
	if err := <-s.done; err != nil {
		return 0, 0, err
	}
	for i, from := range s.samples {
		for _, to := range s.samples[i+1:] {
			if to.after.Sub(from.before) > time.Second {
				break
			}
			most = max(most, to.bytes-from.bytes)
		}
	}
	return s.samples[len(s.samples)-1].bytes - s.samples[0].bytes, most, nil
}

// TestLimitOnTheLink: no second has more on the link than was allowed, as the
// kernel counts it there, also when the source's daemon is killed meanwhile.
func TestLimitOnTheLink(t *testing.T) {
	const limit = 320e6 / 8
	for _, mode := range []string{"stop", "postcopy"} {
		t.Run(mode, func(t *testing.T) {
			h := newTwoHosts(t)
			pid := h.workload("a")
			source := h.client("a")
			defer source.Close()
			s := h.shaper("a", "to-b")
			r, err := source.Migrate(t.Context(), appliance.MigrateRequest{PID: pid, Mode: mode,
				To: h.lab.Host("b").Addr().String(), MaxBandwidth: "320Mbit", Lanes: 3})
			if err != nil {
				t.Fatal(err)
			}
			if mode == "postcopy" {
				testutil.Eventually(t, time.Minute, func() error {
					now, err := source.Show(t.Context(), r.ID)
					if err == nil && now.Finished() {
						t.Fatal(now)
					}
					if err == nil && now.State != "serving" {
						err = fmt.Errorf("it is %s", now.State)
					}
					return err
				})
				h.end("a", unix.SIGKILL)
				h.start("a")
			}
			got := h.watch("a", r.ID)
			all, most, err := s.end()
			if err != nil || got.Outcome != appliance.OutcomeDone || got.MaxBandwidth != limit || got.Lanes != 3 {
				t.Fatalf("%+v, %v", got, err)
			}
			t.Logf("%.3f of the limit in the worst second, %d bytes on the link for %d on lanes", float64(most)/limit, all, got.BytesWire)
			top := 1.05
			if mode == "postcopy" { // its faults are let through
				top *= 1 + pace.DefaultUrgentShare
			}
			if float64(most) > top*limit {
				t.Errorf("%.3f of the limit in one second", float64(most)/limit)
			}
			if x := float64(all) / float64(got.BytesWire); got.BytesWire < 90<<20 || x < 1.03 || x > 1.07 {
				t.Errorf("the link had %.3f times the %d bytes of the lanes; headers of packets are 1.046", x, got.BytesWire)
			}
		})
	}
}
