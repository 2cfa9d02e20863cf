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
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pageferry/pageferry/appliance"
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
	if _, file := cfg.Out.(*os.File); !file {
		cfg.Out = &inTurn{to: cfg.Out}
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

// inTurn lets the daemons and the demo write to one Writer.
type inTurn struct {
	mu sync.Mutex
	to io.Writer
}

func (w *inTurn) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(p)
}
