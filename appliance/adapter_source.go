package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inspect"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/transport"
)

// native is the Engine that freezes and rebuilds by itself.
type native struct{}

// NewEngine returns the native engine.
func NewEngine() Engine { return native{} }

func (native) Inspect(pid int, opts SourceOptions) (Inspection, error) {
	rep, err := look(pid, opts)
	if err != nil {
		return Inspection{}, err
	}
	return inspection(rep), nil
}

func (native) NewHost(opts HostOptions) (Host, error) { return newHost(opts) }

func (native) NewSourceProcess(pid int, opts SourceOptions) (migrate.Process, migrate.Offer, error) {
	rep, err := look(pid, opts)
	if err != nil {
		return nil, migrate.Offer{}, err
	}
	if rs := rep.Refusals(); len(rs) != 0 {
		return nil, migrate.Offer{}, &migrate.Refusal{Reasons: rs}
	}
	s, err := checkpoint.Open(pid, sessionOptions(opts))
	if err != nil {
		return nil, migrate.Offer{}, err
	}
	o, err := offer(rep, opts)
	if err != nil {
		s.Close()
		return nil, migrate.Offer{}, err
	}
	return newProcess(s, pid, opts), o, nil
}

func (native) AdoptSource(ctx context.Context, id transport.MigrationID, pid int, opts SourceOptions) (migrate.Process, error) {
	who := recall(&opts)
	s, err := checkpoint.Reattach(ctx, pid, sessionOptions(opts))
	if err == nil && who != "" && who != hint(s) {
		s.Close()
		err = checkpoint.ErrNoProcess // another one has its number by now
	}
	for _, other := range []error{checkpoint.ErrZombie, checkpoint.ErrThread, checkpoint.ErrKernelThread, checkpoint.ErrSelf} {
		if errors.Is(err, other) { // it has ended, and its number may be another's
			err = fmt.Errorf("%w: %w", migrate.ErrGone, err)
			break
		}
	}
	if err != nil {
		if err = gone(err); errors.Is(err, migrate.ErrGone) {
			sweepLeft(logger(opts.Logger))
		}
		return nil, err
	}
	return newProcess(s, pid, opts), nil
}

func logger(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

func sessionOptions(opts SourceOptions) checkpoint.Options {
	return checkpoint.Options{TCPClose: opts.TCP == "close", Log: opts.Logger}
}

// process is migrate.Process over a checkpoint session.
type process struct {
	s    *checkpoint.Session
	pid  int
	opts SourceOptions
	log  *slog.Logger
	// tcp is what AtSwitch ends: looked for while the destination rebuilds,
	// since it takes a look at every other process. Nil after a restart.
	tcp chan *fds.TCP
	tracked
	pinning
}

func newProcess(s *checkpoint.Session, pid int, opts SourceOptions) *process {
	p := &process{s: s, pid: pid, opts: opts, log: logger(opts.Logger)}
	p.slow = throttle{p: s, log: p.log}
	return p
}

// SwitchNears is when to begin to read what Isolate waits for.
func (p *process) SwitchNears() { p.s.SurveyBeside() }

// Isolate is called right before Freeze, so what that would read first is read
// here: the process still runs.
func (p *process) Isolate(ctx context.Context) error {
	if err := p.s.Isolate(ctx); err != nil {
		return gone(err)
	}
	return gone(p.s.Survey())
}

func (p *process) Freeze(ctx context.Context) (migrate.State, error) {
	p.slow.set(0)
	if err := p.s.Freeze(ctx); err != nil {
		return migrate.State{}, gone(err)
	}
	begin := p.s.Since()
	p.running.Store(false)
	frozen := time.Now()
	img, mem, rest, err := p.s.CaptureState(ctx)
	if err != nil {
		return migrate.State{}, p.runOn(ctx, gone(err))
	}
	captured := time.Now()
	b, err := image.Encode(img)
	if err != nil {
		return migrate.State{}, p.runOn(ctx, err)
	}
	st := migrate.State{Image: b, Memory: memoryMap(mem), Stopped: begin, Rest: func(context.Context) ([]migrate.Memory, error) {
		begin := time.Now()
		mem, err := rest()
		p.log.Debug("page tables walked", "pid", p.pid, "waited", time.Since(begin))
		if err != nil {
			return nil, gone(err)
		}
		all := p.dirtied(memoryMap(mem))
		p.pin(all)
		return all, nil
	}}
	p.tcp = make(chan *fds.TCP, 1)
	go func() {
		t, err := fds.FindTCP(p.pid)
		if err != nil {
			p.log.Warn("looking for connections", "pid", p.pid, "err", err)
		}
		p.tcp <- t
	}()
	p.log.Debug("frozen and captured", "pid", p.pid, "freeze", frozen.Sub(begin), "capture", captured.Sub(frozen),
		"encode", time.Since(captured), "image_bytes", len(b))
	return st, nil
}

func memoryMap(in []image.Memory) (out []migrate.Memory) {
	for _, m := range in {
		out = append(out, migrate.Memory{Space: m.Space, Lazy: m.Lazy, Eager: m.Eager, Hot: m.Hot, Guards: m.Guards})
	}
	return out
}

// runOn lets the process go on after a capture that failed with err.
func (p *process) runOn(ctx context.Context, err error) error {
	if terr := p.s.Thaw(context.WithoutCancel(ctx)); terr != nil {
		return fmt.Errorf("%w; and process %d could not be let go: %v", err, p.pid, terr)
	}
	return err
}

// Hold is also asked of a process that runs, when a person resolved that it
// must not: then it is frozen first, and nothing of its state is taken.
func (p *process) Hold(ctx context.Context) error {
	p.pinned() // nobody makes calls in a process that is held
	if p.s.Held() {
		return nil
	}
	err := p.s.Hold(ctx)
	if !errors.Is(err, checkpoint.ErrState) {
		return gone(err)
	}
	if err := p.s.Isolate(ctx); err != nil {
		return gone(err)
	}
	if err := p.s.Freeze(ctx); err != nil {
		return gone(err)
	}
	return gone(p.s.Hold(ctx))
}

func (p *process) Held(context.Context) (bool, error) {
	if err := p.s.Alive(); err != nil {
		return false, gone(err)
	}
	return p.s.Held(), nil
}

func (p *process) Thaw(ctx context.Context) error {
	p.untrack()
	if err := p.unpin(); err != nil {
		return err
	}
	return gone(p.s.Thaw(ctx))
}

func (p *process) Close() error {
	p.pinned()
	p.untrack()
	return p.s.Close()
}

// Kill also clears away the cgroup that it lived in, where it arrived here by a
// migration itself.
func (p *process) Kill(ctx context.Context) error {
	p.slow.set(0)
	p.pinned()
	err := gone(p.s.Kill(ctx))
	p.untrack() // not before: to take the protection off each GiB takes 20 ms
	if err == nil {
		sweep(p.log)
	}
	return err
}

// sweep clears away the cgroups of processes that arrived and have ended.
func sweep(log *slog.Logger) {
	if err := restore.Sweep(restore.Config{}); err != nil {
		log.Warn("cgroups of processes that have ended", "err", err)
	}
}

// sweepLeft clears away those of processes that were to leave and have ended.
func sweepLeft(log *slog.Logger) {
	if err := checkpoint.SweepLeft(); err != nil {
		log.Warn("cgroups of processes that have ended", "err", err)
	}
}

// BeforeCommit sees to it that no signal is lost: one that the image lacks keeps
// the process here, which gets it.
func (p *process) BeforeCommit(context.Context) error { return gone(p.s.Signaled()) }

// AtSwitch ends the copy's listeners and connections. Nobody will ever answer
// there again, and their clients should learn it now rather than by a timeout.
func (p *process) AtSwitch(context.Context) error {
	if p.tcp != nil {
		if t := <-p.tcp; t != nil {
			p.tcp <- nil
			_, err := t.Destroy()
			return err
		}
		p.tcp <- nil
	}
	_, err := fds.DestroyTCP(p.pid)
	return err
}

// Clocks are those that the process sees.
func (p *process) Clocks() (monotonic, boottime time.Duration, err error) {
	monotonic, boottime, err = checkpoint.Clocks(p.pid)
	return monotonic, boottime, gone(err)
}

// exitLimit is how long the end of the copy in good order may take.
const exitLimit = 10 * time.Second

// OnSourceExit sees to it that the copy's end does not make its parent or unit
// start another one. Kill comes after it and finds nothing to do where the copy
// has ended by itself.
func (p *process) OnSourceExit(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, exitLimit) // Kill is next
	defer cancel()
	switch p.opts.OnSourceExit {
	case "exit0":
		return gone(p.s.Exit(ctx, 0))
	case "stop-unit":
		return stopUnit(ctx, p.pid)
	}
	return nil
}

// stopUnit tells systemd that the unit of pid is to be down. It does not wait:
// the unit's frozen process ends when it is killed, and a unit that is being
// stopped is not restarted (systemd.service(5), Restart=).
func stopUnit(ctx context.Context, pid int) error {
	rep, err := inspect.InspectContext(ctx, pid, inspect.Options{TCPClose: true})
	if err != nil {
		return err
	}
	if rep.Unit == nil {
		return fmt.Errorf("process %d is in no systemd unit", pid)
	}
	out, err := exec.CommandContext(ctx, "systemctl", "--no-block", "stop", rep.Unit.Name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl stop %s: %w: %s", rep.Unit.Name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Describe names the process beyond the reuse of its number, and says how it was
// asked to leave.
func (p *process) Describe() []byte {
	return []byte(hint(p.s) + hintTCP + p.opts.TCP + hintExit + p.opts.OnSourceExit + hintLanes(p.opts))
}

// What follows in the description of a process.
const (
	hintTCP  = " tcp="
	hintExit = " exit="
)

// recall takes from opts.Hint how the process was asked to leave, and returns
// which one it was.
func recall(opts *SourceOptions) string {
	said, _ := recallLanes(string(opts.Hint))
	who, how, ok := strings.Cut(said, hintTCP)
	if tcp, exit, whole := strings.Cut(how, hintExit); ok && whole {
		opts.TCP, opts.OnSourceExit = tcp, exit
	}
	return who
}

// hint also names the boot: daemons get the same number at the same moment after
// every one.
func hint(s *checkpoint.Session) string {
	return fmt.Sprintf("start %d boot %s", s.StartTime(), bootID())
}

var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
})

// gone tells migrate in its own words that a process does not exist any more.
func gone(err error) error {
	if errors.Is(err, proc.ErrGone) || errors.Is(err, checkpoint.ErrNoProcess) {
		return fmt.Errorf("%w: %w", migrate.ErrGone, err)
	}
	return err
}

// ReadPages says that the pages are gone only where the process has ended for
// certain: the destination gives up for it what it cannot get back.
func (p *process) ReadPages(space page.Space, rs []page.Range, buf []byte) error {
	err := p.s.ReadPages(space, rs, buf)
	if space < page.FirstFileSpace && p.running.Load() {
		if err != nil {
			err = p.readRunning(space, rs, buf)
		}
		if err == nil && p.tracker != nil {
			p.tracker.Sent(rs, buf)
		}
	}
	if err != nil && errors.Is(p.s.Alive(), proc.ErrGone) {
		return fmt.Errorf("%w: %w", stream.ErrGone, err)
	}
	return err
}
