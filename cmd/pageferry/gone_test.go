package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// TestFrozenCopyLost kills the frozen copy at the source while pages are missing,
// also where one of the daemons or both are not there to see it. The process at
// the destination must neither wait for ever nor work with zeros, both sides must
// say what happened, and nothing of it may stay.
func TestFrozenCopyLost(t *testing.T) {
	for _, c := range []struct {
		name string
		down []string
	}{
		{"daemons there", nil},
		{"source's daemon away", []string{"a"}},
		{"destination's daemon away", []string{"b"}},
		{"both away", []string{"a", "b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newTwoHosts(t)
			if _, err := h.lab.Host("a").Run(t.Context(), "tc", "qdisc", "change", "dev", "to-b", "root", "tbf",
				"rate", "100mbit", "burst", "256kb", "latency", "50ms"); err != nil {
				t.Fatal(err)
			}
			pid := h.workload("a")
			r := h.serving(pid)
			there := h.destPID(r.ID)
			for _, name := range c.down {
				h.end(name, unix.SIGKILL)
			}
			if _, err := h.lab.Host("a").Run(t.Context(), "sh", "-c", "kill -KILL "+strconv.Itoa(pid)); err != nil {
				t.Fatal(err)
			}
			if h.rss("b", there) == 0 {
				t.Fatal("it ended too early for this test")
			}
			for _, name := range c.down {
				h.start(name)
			}
			for _, name := range []string{"a", "b"} {
				h.lost(name, r.ID)
			}
			testutil.Eventually(t, 20*time.Second, func() error {
				if h.rss("b", there) != 0 {
					return errors.New("it runs on without its memory")
				}
				return nil
			})
			testutil.Eventually(t, 15*time.Second, func() error { return errors.Join(h.settled("a"), h.settled("b")) })
		})
	}
}

// destPID is the process at the destination, which knows it first.
func (h *twoHosts) destPID(id string) (pid int) {
	h.t.Helper()
	c := h.client("b")
	defer c.Close()
	testutil.Eventually(h.t, 10*time.Second, func() error {
		r, err := c.Show(h.t.Context(), id)
		if err == nil && r.DestPID == 0 {
			err = fmt.Errorf("the destination is %s and names no process", r.State)
		}
		pid = r.DestPID
		return err
	})
	return pid
}

// lost waits until the daemon says that the migration was lost.
func (h *twoHosts) lost(name, id string) {
	h.t.Helper()
	c := h.client(name)
	defer c.Close()
	testutil.Eventually(h.t, 15*time.Second, func() error {
		r, err := c.Show(h.t.Context(), id)
		if err == nil && r.Outcome != appliance.OutcomeLost {
			err = fmt.Errorf("host %s says %q, %s: %s", name, r.Outcome, r.State, r.Reason)
		}
		if err == nil && !strings.Contains(r.Reason, "pages") {
			err = fmt.Errorf("host %s gives no reason: %q", name, r.Reason)
		}
		return err
	})
}

// settled returns an error while a host keeps something of a migration.
func (h *twoHosts) settled(name string) error {
	root := h.lab.Host(name).Root()
	for _, pattern := range []string{
		"run/pageferry/arrivals/*", "var/lib/pageferry/journal/*.source", "var/lib/pageferry/journal/*.destination",
	} {
		left, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(left) != 0 {
			return fmt.Errorf("host %s has kept %v: %v", name, left, err)
		}
	}
	return nil
}
