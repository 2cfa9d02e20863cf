package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/appliance/lab"
)

// Config of a demo.
type Config struct {
	Size    uint64 // bytes of data in redis
	Hops    int    // migrations; 2 is there and back
	Clients int
	Request appliance.MigrateRequest // the options of each migration
	// Insecure leaves TLS out of everything, PlainPages out of the page lanes.
	Insecure, PlainPages bool
	Verbose              bool      // the daemons' logs go to Out
	Out                  io.Writer // what is going on, in words; nil discards
	OnProgress           func(appliance.Report)
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	switch {
	case c.Size < 1<<20 || c.Size > 1<<40:
		return fmt.Errorf("size %d: want 1MiB to 1TiB", c.Size)
	case c.Hops < 1 || c.Hops > 1000:
		return fmt.Errorf("%d hops: want 1 to 1000", c.Hops)
	case c.Clients < 1 || c.Clients > 100:
		return fmt.Errorf("%d clients: want 1 to 100", c.Clients)
	case c.Request.TCP == "refuse":
		return errors.New("--tcp refuse would refuse: the demo's clients stay connected")
	}
	return nil
}

const redisPort = 6379

// stage is the two hosts with all that runs in them.
type stage struct {
	cfg     Config
	lab     *lab.Lab
	keys    string // directory
	daemons []*lab.Program
	logs    []*bytes.Buffer
	clients []*client
}

// Run is the demo. The result is not nil where at least one migration was tried.
// Everything is removed when it returns.
func Run(ctx context.Context, cfg Config) (_ *Result, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Out == nil {
		cfg.Out = io.Discard
	}
	redis, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, errors.New("redis-server is not installed: apt install redis-server")
	}
	s := &stage{cfg: cfg}
	defer func() {
		// What is left behind is said by itself: an interrupted demo's own
		// error is not worth a word.
		if cerr := s.close(); cerr != nil {
			s.say("not everything could be removed: %v", cerr)
			err = errors.Join(err, cerr)
		}
	}()
	if err := s.build(ctx); err != nil {
		return nil, err
	}
	if err := s.load(ctx, redis); err != nil {
		return nil, err
	}
	return s.play(ctx)
}

func (s *stage) say(format string, args ...any) { fmt.Fprintf(s.cfg.Out, format+"\n", args...) }

func (s *stage) close() error {
	var errs []error
	if s.lab != nil {
		errs = append(errs, s.lab.Close())
	}
	for _, p := range s.daemons {
		<-p.Done()
	}
	if s.keys != "" {
		errs = append(errs, os.RemoveAll(s.keys))
	}
	return errors.Join(errs...)
}

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

// digest is over a sample of the keys that the clients do not touch.
func (s *stage) digest(ctx context.Context) (string, error) {
	c := &client{id: -1, dial: s.lab.Dial, addresses: s.clients[0].addresses}
	defer c.hangUp()
	total, step := s.bulk()
	sum := sha256.New()
	for n := uint64(0); n < total; n += step {
		last := min(step, total-n)
		for i := uint64(0); i < last; i += max(1, last/200) {
			key := fmt.Sprintf("bulk%d:%d", n, i)
			v, err := c.ask(ctx, nil, "GET", key)
			if err != nil {
				return "", fmt.Errorf("%s: %w", key, err)
			}
			fmt.Fprintf(sum, "%s %d %s\n", key, len(v), v)
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// play moves redis between the hosts while the clients work.
func (s *stage) play(ctx context.Context) (*Result, error) {
	before, err := s.digest(ctx)
	if err != nil {
		return nil, fmt.Errorf("before the first migration: %w", err)
	}
	work, stop := context.WithCancel(ctx)
	defer stop()
	g, work := errgroup.WithContext(work)
	for _, c := range s.clients {
		g.Go(func() error { return c.run(work) })
	}
	res := &Result{Mode: s.cfg.Request.Mode, Size: s.cfg.Size}
	err = s.hops(work, res)
	stop()
	werr := g.Wait()
	if ctx.Err() != nil {
		return res, context.Cause(ctx)
	}
	if werr != nil && !errors.Is(werr, context.Canceled) {
		err = errors.Join(werr, err)
	}
	if err != nil {
		return res, s.explain(err)
	}
	s.say("checking every key")
	for _, c := range s.clients {
		n, err := c.checkAll(ctx)
		res.KeysChecked += n
		if err != nil {
			return res, err
		}
		res.Writes += c.stats.writes
		res.Reads += c.stats.reads
	}
	after, err := s.digest(ctx)
	if err != nil {
		return res, fmt.Errorf("after the last migration: %w", err)
	}
	if after != before {
		return res, errors.New("the data that nobody wrote to has changed")
	}
	res.OK = true
	return res, nil
}

// explain adds what the daemons said to an error that they may have caused.
func (s *stage) explain(err error) error {
	if s.cfg.Verbose {
		return err
	}
	for i, l := range s.logs {
		select {
		case <-s.daemons[i].Done(): // only then nobody writes to it
			lines := strings.Split(strings.TrimSpace(l.String()), "\n")
			err = fmt.Errorf("%w; the daemon of host %s ended, saying: %s", err, s.lab.Hosts()[i].Name(), lines[len(lines)-1])
		default:
		}
	}
	return err
}

// hops runs the migrations one after the other.
func (s *stage) hops(ctx context.Context, res *Result) error {
	hosts := s.lab.Hosts()
	// The clients must be at work before the first, and some time in between.
	pause := func() error {
		select {
		case <-time.After(time.Second):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for i := range s.cfg.Hops {
		from, to := hosts[i%2], hosts[(i+1)%2]
		if err := pause(); err != nil {
			return err
		}
		for _, c := range s.clients {
			c.takeHop()
		}
		s.say("hop %d: host %s to host %s", i+1, from.Name(), to.Name())
		rep, err := s.move(ctx, from, to)
		if rep.ID != "" {
			hop := Hop{From: from.Name(), To: to.Name(), Report: rep}
			// A write that hangs in the gap ends it when it is acknowledged.
			if err == nil {
				if err := pause(); err != nil {
					return err
				}
			}
			for _, c := range s.clients {
				st := c.takeHop()
				hop.Gap = max(hop.Gap, st.gap)
				hop.Writes += st.writes
			}
			hop.GapMS = float64(hop.Gap) / float64(time.Millisecond)
			res.Hops = append(res.Hops, hop)
		}
		if err != nil {
			return fmt.Errorf("hop %d: %w", i+1, err)
		}
		s.cfg.Request.PID = rep.DestPID
	}
	return nil
}

// move asks the daemon of one host to send redis to the other, and follows it.
func (s *stage) move(ctx context.Context, from, to *lab.Host) (appliance.Report, error) {
	c := s.api(from)
	defer c.Close()
	req := s.cfg.Request
	req.To = to.Addr().String()
	if req.TCP == "" {
		req.TCP = "close"
	}
	rep, err := c.Migrate(ctx, req)
	if err != nil {
		return rep, err
	}
	rep, err = c.Watch(ctx, rep.ID, s.cfg.OnProgress)
	if err != nil {
		return rep, err
	}
	if rep.Outcome != appliance.OutcomeDone {
		return rep, &OutcomeError{Report: rep}
	}
	return rep, nil
}

// OutcomeError is a migration that did not come to its end.
type OutcomeError struct{ Report appliance.Report }

func (e *OutcomeError) Error() string {
	return fmt.Sprintf("process %d to %s: %s: %s", e.Report.SourcePID, e.Report.Peer, e.Report.Outcome, e.Report.Reason)
}
