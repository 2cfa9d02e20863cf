package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/appliance/lab"
)

// StageConfig is what a stage is made of.
type StageConfig struct {
	// Binary is the path of pageferry; it must be visible in the hosts, which
	// have a /run, /var/lib and /dev/shm of their own.
	Binary string
	// Dir is for what the programs write: an existing directory, likewise.
	Dir string
	// PlainPages leaves TLS out of the page lanes.
	PlainPages bool
	// Name tells stages apart; see lab.Config. Default: from the process id.
	Name string
}

// Stage is two hosts with a daemon in each, and a third from which clients come.
// Its methods are called by one goroutine.
type Stage struct {
	cfg  StageConfig
	lab  *lab.Lab
	logs map[string]*logBook
	ends []*lab.Program
	api  map[string]*appliance.Client
	n    int // programs started
}

const (
	hostA, hostB, hostClient = "a", "b", "client"
	// firstPID is above whatever a fresh host's own processes and their threads
	// are, on either side: a program keeps its numbers when it moves.
	firstPID = 5000
	// daemonCgroup is the cgroup of a host in which its daemon runs.
	daemonCgroup = "daemon"
)

// NewStage makes hosts and daemons. Close ends it.
func NewStage(ctx context.Context, cfg StageConfig) (_ *Stage, err error) {
	s := &Stage{cfg: cfg, logs: map[string]*logBook{}, api: map[string]*appliance.Client{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.lab, err = lab.New(ctx, lab.Config{Name: cfg.Name, Hosts: []string{hostA, hostB, hostClient}}); err != nil {
		return nil, err
	}
	ca := filepath.Join(cfg.Dir, "keys")
	if err := os.MkdirAll(ca, 0o700); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(ca, keys.AuthorityCert)); errors.Is(err, os.ErrNotExist) {
		if err := keys.Init(ca); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{hostA, hostB} {
		if err := s.startDaemon(ctx, s.lab.Host(name), ca); err != nil {
			return nil, fmt.Errorf("host %s: %w", name, err)
		}
	}
	_, err = s.lab.Host(hostA).Run(ctx, "sh", "-c", fmt.Sprintf("echo %d > /proc/sys/kernel/ns_last_pid", firstPID-1))
	return s, err
}

// Close ends everything and waits for it. Idempotent.
func (s *Stage) Close() error {
	for _, c := range s.api {
		c.Close()
	}
	if s.lab == nil {
		return nil
	}
	err := s.lab.Close()
	for _, p := range s.ends {
		<-p.Done()
	}
	return err
}

// Hosts are the one where programs start and the other one.
func (s *Stage) Hosts() (a, b *lab.Host) { return s.lab.Host(hostA), s.lab.Host(hostB) }

func (s *Stage) startDaemon(ctx context.Context, h *lab.Host, ca string) error {
	dir := filepath.Join(h.Root(), "run/pageferry")
	// Both have the directory in which redis stands, as two hosts with the same
	// package installed do.
	for _, d := range []string{dir, filepath.Join(h.Root(), "var/lib/redis")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := keys.Issue(ca, h.Name(), dir); err != nil {
		return err
	}
	pem, err := os.ReadFile(filepath.Join(ca, keys.AuthorityCert))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, keys.AuthorityCert), pem, 0o644); err != nil {
		return err
	}
	cert, key := keys.HostFiles(h.Name())
	text := fmt.Sprintf("name: %s\nlog_level: debug\nlimits: {memory_reserve: 64MiB}\ndefaults: {tcp: close}\n"+
		"tls: {ca: /run/pageferry/%s, cert: /run/pageferry/%s, key: /run/pageferry/%s}\n", h.Name(), keys.AuthorityCert, cert, key)
	if s.cfg.PlainPages {
		text += "page_lanes: plain\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		return err
	}
	book := newLogBook()
	cmd := exec.Command(s.cfg.Binary, "daemon", "--config", "/run/pageferry/config.yaml")
	cmd.Stdout, cmd.Stderr = book, book
	p, err := h.Start(daemonCgroup, cmd)
	if err != nil {
		return err
	}
	s.ends = append(s.ends, p)
	s.logs[h.Name()] = book
	c := appliance.NewClient(filepath.Join(h.Root(), appliance.DefaultSocket))
	s.api[h.Name()] = c
	return waitFor(ctx, 20*time.Second, p, func() error {
		_, err := c.Info(ctx)
		return err
	}, func() error { return fmt.Errorf("the daemon ended: %s", book.last()) })
}

// waitFor tries f until it works, the program ends, or the time is up.
func waitFor(ctx context.Context, limit time.Duration, p *lab.Program, f, why func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-p.Done():
			return why()
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Guest is a program that is moved about.
type Guest struct {
	Host *lab.Host // where it is now
	PID  int       // what that host calls it
	Out  string    // the file that has what it prints
	prog *lab.Program
}

// Start starts a program as a service manager does: nothing of a terminal, its
// own session, what it prints in a file that both hosts have.
func (s *Stage) Start(argv ...string) (*Guest, *lab.Program, error) {
	s.n++
	g := &Guest{Host: s.lab.Host(hostA), Out: filepath.Join(s.cfg.Dir, fmt.Sprintf("out%d", s.n))}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer null.Close()
	out, err := os.OpenFile(g.Out, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o644)
	if err != nil {
		return nil, nil, err
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, out, out
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	p, err := g.Host.Start("guest", cmd)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", argv[0], err)
	}
	s.ends, g.prog = append(s.ends, p), p
	g.PID, err = g.Host.PID(p.PID())
	return g, p, err
}

// said waits until a program that has just been started has printed text.
func (g *Guest) said(ctx context.Context, p *lab.Program, text string, limit time.Duration) error {
	read := func() string {
		b, _ := g.output()
		return string(b)
	}
	return waitFor(ctx, limit, p, func() error {
		if !strings.Contains(read(), text) {
			return fmt.Errorf("has not printed %q", text)
		}
		return nil
	}, func() error { return fmt.Errorf("it ended: %s", strings.TrimSpace(read())) })
}

// ErrNotMoved: the migration failed, and the guest runs on where it was.
var ErrNotMoved = errors.New("not moved")

// Move migrates g to the other host, and returns when all of it is there.
func (s *Stage) Move(ctx context.Context, g *Guest, mode string) (Hop, error) {
	return s.MoveAs(ctx, g, appliance.MigrateRequest{Mode: mode})
}

// MoveAs is Move with more options; who and where to is filled in. With
// ErrNotMoved the Hop has the report and nothing else.
func (s *Stage) MoveAs(ctx context.Context, g *Guest, req appliance.MigrateRequest) (Hop, error) {
	from, to := s.Hosts()
	if g.Host == to {
		from, to = to, from
	}
	for _, b := range s.logs {
		b.take("")
	}
	source, err := sourceCPU(from)
	if err != nil {
		return Hop{}, err
	}
	dest, err := destCPU(to, 0)
	if err != nil {
		return Hop{}, err
	}
	req.PID, req.To, req.TCP = g.PID, to.Addr().String(), "close"
	rep, err := s.api[from.Name()].Migrate(ctx, req)
	if err == nil {
		rep, err = s.api[from.Name()].Watch(ctx, rep.ID, nil)
	}
	if err == nil && rep.Outcome != appliance.OutcomeDone {
		err = fmt.Errorf("%s: %s", rep.Outcome, rep.Reason)
		if rep.Outcome == appliance.OutcomeFailed {
			err = fmt.Errorf("%w: %w", ErrNotMoved, err)
		}
	}
	if err != nil {
		return Hop{Report: rep}, fmt.Errorf("pid %d of host %s to host %s: %w", g.PID, from.Name(), to.Name(), err)
	}
	g.Host, g.PID = to, rep.DestPID
	h := Hop{Report: rep}
	for _, end := range []struct{ host, role string }{{from.Name(), "source"}, {to.Name(), "destination"}} {
		steps, err := s.logs[end.host].finished(ctx, rep.ID, end.role)
		if err != nil {
			return Hop{}, fmt.Errorf("host %s: %w", end.host, err)
		}
		h.Steps = append(h.Steps, steps...)
	}
	ran := s.logs[from.Name()].ranAt(rep.ID)
	if ran.IsZero() {
		return Hop{}, fmt.Errorf("host %s: its daemon has not logged the switch of migration %s", from.Name(), rep.ID)
	}
	h.Running = ran.Sub(rep.Started)
	if h.SourceCPU, err = sourceCPU(from); err != nil {
		return Hop{}, err
	}
	if h.DestCPU, err = destCPU(to, g.PID); err != nil {
		return Hop{}, err
	}
	h.SourceCPU, h.DestCPU = h.SourceCPU-source, h.DestCPU-dest
	return h, nil
}

// Hop is one migration.
type Hop struct {
	Report appliance.Report
	// Running is from the request until the process ran at the destination.
	Running time.Duration
	// Steps is how long parts of it took, as the daemons' logs have it.
	Steps []Step
	// SourceCPU and DestCPU are the processor time that the source's daemon and
	// the destination's, its pager and all else there but the guest used.
	SourceCPU, DestCPU time.Duration
}

// Downtime is freeze to running as the daemon reports it.
func (h *Hop) Downtime() time.Duration { return millis(h.Report.DowntimeMS) }

// Whole is from the request until the process ran at the destination and all its
// pages were there. What the source still does, such as freeing its copy, is not
// in it.
func (h *Hop) Whole() time.Duration { return h.Running + max(0, h.Resident()-h.Downtime()) }

// SentPages is how often any page with content was sent, as it is or in less.
func (h *Hop) SentPages() uint64 {
	s := &h.Report.Saved
	return s.Raw.Pages + s.LZ4.Pages + s.Delta.Pages + s.Same.Pages
}

// Resident is freeze to the last page.
func (h *Hop) Resident() time.Duration { return millis(h.Report.ResidentMS) }

func millis(f float64) time.Duration { return time.Duration(f * float64(time.Millisecond)) }
