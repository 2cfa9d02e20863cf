package demo

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/appliance/lab"
)

// build makes hosts, keys and daemons.
func (s *stage) build(ctx context.Context) (err error) {
	s.say("making two hosts")
	if s.lab, err = lab.New(ctx, lab.Config{}); err != nil {
		return err
	}
	if !s.cfg.Insecure {
		if s.keys, err = os.MkdirTemp("", "pageferry-demo-keys"); err != nil {
			return err
		}
		if err := keys.Init(s.keys); err != nil {
			return err
		}
	}
	for _, h := range s.lab.Hosts() {
		if err := s.startDaemon(ctx, h); err != nil {
			return fmt.Errorf("host %s: %w", h.Name(), err)
		}
	}
	return nil
}

// startDaemon runs a daemon in a host and waits until it answers.
func (s *stage) startDaemon(ctx context.Context, h *lab.Host) error {
	dir := filepath.Join(h.Root(), "run/pageferry")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// Both have the directory in which redis stands, as two hosts with the same
	// package installed do.
	if err := os.MkdirAll(filepath.Join(h.Root(), "var/lib/redis"), 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("name: %s\nlimits: {memory_reserve: 64MiB}\ndefaults: {tcp: close}\n", h.Name())
	if s.cfg.Insecure {
		text += "insecure: true\n"
	} else {
		if err := keys.Issue(s.keys, h.Name(), dir); err != nil {
			return err
		}
		ca, err := os.ReadFile(filepath.Join(s.keys, keys.AuthorityCert))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, keys.AuthorityCert), ca, 0o644); err != nil {
			return err
		}
		cert, key := keys.HostFiles(h.Name())
		text += fmt.Sprintf("tls: {ca: /run/pageferry/%s, cert: /run/pageferry/%s, key: /run/pageferry/%s}\n", keys.AuthorityCert, cert, key)
		if s.cfg.PlainPages {
			text += "page_lanes: plain\n"
		}
	}
	if s.cfg.Verbose {
		text += "log_level: debug\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	log := &bytes.Buffer{}
	cmd := exec.Command("/proc/self/exe", "daemon", "--config", "/run/pageferry/config.yaml")
	cmd.Stdout, cmd.Stderr = log, log
	if s.cfg.Verbose {
		cmd.Stdout, cmd.Stderr = s.cfg.Out, s.cfg.Out
	}
	p, err := h.Start("daemon", cmd)
	if err != nil {
		return err
	}
	s.daemons, s.logs = append(s.daemons, p), append(s.logs, log)
	c := s.api(h)
	defer c.Close()
	return waitFor(ctx, 20*time.Second, p.Done(), func() error {
		_, err := c.Info(ctx)
		return err
	}, func() error { return fmt.Errorf("the daemon ended: %s", strings.TrimSpace(log.String())) })
}

func (s *stage) api(h *lab.Host) *appliance.Client {
	return appliance.NewClient(filepath.Join(h.Root(), appliance.DefaultSocket))
}

// waitFor tries f until it works, ended is closed, or the time is up.
func waitFor(ctx context.Context, limit time.Duration, ended <-chan struct{}, f, why func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return why()
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// load starts redis on the first host and fills it.
func (s *stage) load(ctx context.Context, redis string) error {
	home := s.lab.Hosts()[0]
	log := &bytes.Buffer{}
	cmd := exec.Command(redis, "--port", strconv.Itoa(redisPort), "--bind", "0.0.0.0", "--protected-mode", "no",
		"--save", "", "--appendonly", "no", "--dir", "/var/lib/redis", "--logfile", "", "--daemonize", "no",
		"--enable-debug-command", "yes")
	if major(redis) < 7 {
		cmd.Args = cmd.Args[:len(cmd.Args)-2] // older ones have no such option, and need none
	}
	// A long-running host is far past the pids of its daemon's threads; a fresh
	// one is not, and redis would share a number with one of those over there.
	if _, err := home.Run(ctx, "sh", "-c", "echo 4999 > /proc/sys/kernel/ns_last_pid"); err != nil {
		return err
	}
	// As a service manager starts it: nothing of this terminal, its own session.
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	p, err := home.Start("redis", cmd)
	if err != nil {
		return fmt.Errorf("redis-server: %w", err)
	}
	if s.cfg.Request.PID, err = home.PID(p.PID()); err != nil {
		return err
	}
	var addresses []string
	for _, h := range s.lab.Hosts() {
		addresses = append(addresses, fmt.Sprintf("%s:%d", h.Addr(), redisPort))
	}
	for i := range s.cfg.Clients {
		s.clients = append(s.clients, &client{id: i, dial: s.lab.Dial, addresses: addresses})
	}
	first := s.clients[0]
	defer first.hangUp()
	if err := waitFor(ctx, 20*time.Second, p.Done(), func() error {
		nc, err := s.lab.Dial(ctx, "tcp", addresses[0])
		if err == nil {
			first.conn = newConn(nc)
			_, err = first.conn.do("PING")
		}
		if err != nil {
			first.hangUp()
		}
		return err
	}, func() error { return fmt.Errorf("redis-server ended: %s", log) }); err != nil {
		return fmt.Errorf("redis-server: %w", err)
	}
	return s.populate(ctx, first.conn)
}

func major(redis string) int {
	out, err := exec.Command(redis, "--version").Output()
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(out), " v=")
	n, _, _ := strings.Cut(rest, ".")
	v, _ := strconv.Atoi(n)
	return v
}

const valueBytes = 4096

// bulk is how many keys make up the data, and how many are made at one time.
func (s *stage) bulk() (total, step uint64) {
	total = max(1, s.cfg.Size/(valueBytes+96)) // 96: what redis keeps for a key
	return total, max(1, total/32)
}

// populate has redis make its own data, in steps so that Ctrl-C is heard.
func (s *stage) populate(ctx context.Context, c *conn) error {
	total, step := s.bulk()
	s.say("loading redis-server with %d keys of %d bytes", total, valueBytes)
	for n := uint64(0); n < total; n += step {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		if _, err := c.do("DEBUG", "POPULATE", strconv.FormatUint(min(step, total-n), 10),
			fmt.Sprintf("bulk%d", n), strconv.Itoa(valueBytes)); err != nil {
			return fmt.Errorf("loading redis-server: %w", err)
		}
	}
	return nil
}
