package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
)

// twoHosts is a lab with a daemon in each host.
type twoHosts struct {
	t       *testing.T
	lab     *lab.Lab
	daemons map[string]*lab.Program
}

func newTwoHosts(t *testing.T) *twoHosts {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Program("tc"))
	testutil.NoLeaks(t)
	l, err := lab.New(t.Context(), lab.Config{Name: testutil.Name()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &twoHosts{t: t, lab: l, daemons: map[string]*lab.Program{}}
	// Slow enough that a migration is still on its way when it is looked at.
	if _, err := l.Host("a").Run(t.Context(), "tc", "qdisc", "add", "dev", "to-b", "root", "tbf",
		"rate", "400mbit", "burst", "256kb", "latency", "50ms"); err != nil {
		t.Fatal(err)
	}
	for _, host := range l.Hosts() {
		h.start(host.Name())
	}
	return h
}

func (h *twoHosts) start(name string) {
	h.t.Helper()
	host := h.lab.Host(name)
	config := filepath.Join(host.Root(), "run/config.yaml")
	text := fmt.Sprintf("name: %s\ninsecure: true\nlog_level: debug\nlimits: {memory_reserve: 16MiB}\n", name)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "daemon", "--config", "/run/config.yaml")
	cmd.Stderr = logTo{h.t, name}
	p, err := host.Start("daemon", cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	h.daemons[name] = p
	c := h.client(name)
	defer c.Close()
	testutil.Eventually(h.t, 20*time.Second, func() error {
		_, err := c.Info(h.t.Context())
		return err
	})
}

func (h *twoHosts) end(name string, sig unix.Signal) {
	h.t.Helper()
	if err := h.daemons[name].Signal(sig); err != nil {
		h.t.Fatal(err)
	}
	select {
	case <-h.daemons[name].Done():
	case <-time.After(20 * time.Second):
		h.t.Fatalf("the daemon of host %s does not end on %v", name, sig)
	}
}

func (h *twoHosts) client(name string) *appliance.Client {
	return appliance.NewClient(filepath.Join(h.lab.Host(name).Root(), appliance.DefaultSocket))
}

type logTo struct {
	t    *testing.T
	name string
}

func (l logTo) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		l.t.Logf("%s: %s", l.name, strings.TrimSpace(line))
	}
	return len(p), nil
}

// workload starts a process in a host that verifies all its memory all the time
// and ends at the first wrong byte.
func (h *twoHosts) workload(name string) (pid int) {
	h.t.Helper()
	host := h.lab.Host(name)
	if _, err := host.Run(h.t.Context(), "sh", "-c", "echo 4999 > /proc/sys/kernel/ns_last_pid"); err != nil {
		h.t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer null.Close()
	cmd := exec.Command("/proc/self/exe", "workload", "--size", "128MiB", "--threads", "2", "--rate", "32MiB")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	p, err := host.Start("workload", cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	if pid, err = host.PID(p.PID()); err != nil {
		h.t.Fatal(err)
	}
	// It must have its memory before it is worth moving.
	testutil.Eventually(h.t, 20*time.Second, func() error {
		if rss := h.rss(name, pid); rss < 100<<10 {
			return fmt.Errorf("%d KiB resident", rss)
		}
		return nil
	})
	return pid
}

// rss is in KiB, 0 where there is no such process.
func (h *twoHosts) rss(name string, pid int) (kib int) {
	data, _ := os.ReadFile(fmt.Sprintf("%s/proc/%d/status", h.lab.Host(name).Root(), pid))
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			_, _ = fmt.Sscan(rest, &kib)
		}
	}
	return kib
}

// runs reports whether the process is there and gets work done.
func (h *twoHosts) runs(name string, pid int) error {
	ticks := func() string {
		data, err := os.ReadFile(fmt.Sprintf("%s/proc/%d/stat", h.lab.Host(name).Root(), pid))
		if err != nil {
			return ""
		}
		f := strings.Fields(string(data)[strings.LastIndexByte(string(data), ')')+1:])
		if f[0] == "Z" {
			return ""
		}
		return f[11] + " " + f[12] // utime and stime
	}
	before := ticks()
	if before == "" {
		return errors.New("it is not there")
	}
	for range 100 {
		if now := ticks(); now != before {
			if now == "" {
				return errors.New("it has ended")
			}
			return nil
		}
		time.Sleep(20 * time.Millisecond) // what is waited for is that time passes
	}
	return errors.New("it does nothing")
}

func (h *twoHosts) watch(name, id string) appliance.Report {
	h.t.Helper()
	c := h.client(name)
	defer c.Close()
	r, err := c.Watch(h.t.Context(), id, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

// TestDaemonsEndWhilePagesArrive ends one daemon or both in the middle of
// post-copy, by either signal. The process runs on at the destination all the
// time, and the next daemons bring the rest over.
func TestDaemonsEndWhilePagesArrive(t *testing.T) {
	for _, c := range []struct {
		name string
		sig  unix.Signal
		who  []string
	}{
		{"source stopped", unix.SIGTERM, []string{"a"}},
		{"destination stopped", unix.SIGTERM, []string{"b"}},
		{"source killed", unix.SIGKILL, []string{"a"}},
		{"destination killed", unix.SIGKILL, []string{"b"}},
		{"both killed", unix.SIGKILL, []string{"a", "b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newTwoHosts(t)
			pid := h.workload("a")
			source := h.client("a")
			defer source.Close()
			r, err := source.Migrate(t.Context(), appliance.MigrateRequest{PID: pid, Mode: "postcopy", To: h.lab.Host("b").Addr().String()})
			if err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, 30*time.Second, func() error {
				now, err := source.Show(t.Context(), r.ID)
				if err != nil || now.State != "serving" {
					return fmt.Errorf("it is %s, %s, %v", now.State, now.Reason, err)
				}
				return nil
			})
			for _, name := range c.who {
				h.end(name, c.sig)
			}
			for _, name := range c.who {
				h.start(name)
			}
			got := h.watch("a", r.ID)
			if got.Outcome != appliance.OutcomeDone {
				t.Fatalf("%+v", got)
			}
			if err := h.runs("b", got.DestPID); err != nil {
				t.Errorf("at the destination: %v", err)
			}
			if h.rss("a", pid) != 0 {
				t.Error("there is a copy left at the source")
			}
		})
	}
}

// TestDaemonKilledBeforeTheSwitch: the process runs on at the source.
func TestDaemonKilledBeforeTheSwitch(t *testing.T) {
	h := newTwoHosts(t)
	pid := h.workload("a")
	source := h.client("a")
	defer source.Close()
	r, err := source.Migrate(t.Context(), appliance.MigrateRequest{PID: pid, To: h.lab.Host("b").Addr().String(), Mode: "stop"})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 30*time.Second, func() error {
		now, err := source.Show(t.Context(), r.ID)
		if err != nil || now.State != "frozen" {
			return fmt.Errorf("it is %s, %v", now.State, err)
		}
		return nil
	})
	h.end("a", unix.SIGKILL)
	h.start("a")
	got := h.watch("a", r.ID)
	switch got.Outcome {
	case appliance.OutcomeFailed:
		if err := h.runs("a", pid); err != nil {
			t.Errorf("at the source: %v", err)
		}
	case appliance.OutcomeDone: // the kill came after the switch
		if err := h.runs("b", got.DestPID); err != nil {
			t.Errorf("at the destination: %v", err)
		}
	default:
		t.Fatalf("%+v", got)
	}
}
