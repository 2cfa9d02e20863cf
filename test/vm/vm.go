package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"syscall"
	"time"

	"github.com/pageferry/pageferry/test/vm/link"
)

const (
	// DefaultLimit is how long a command may take.
	DefaultLimit = 2 * time.Minute
	// DefaultMemory is the guest's memory in MiB. The host gives what is used.
	DefaultMemory = 3072
	// DefaultPath is where a guest looks for programs.
	DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// bootLimit is generous: a busy host makes a guest slow.
	bootLimit = 4 * time.Minute
	// bootTries is how often a guest is booted whose kernel dies before it has
	// started the command.
	bootTries = 3
	// offLimit is how long a guest may take to turn itself off.
	offLimit = 10 * time.Second
)

// ErrGuest is a guest that did not boot, or ended before its command did.
var ErrGuest = errors.New("the guest failed")

// errBoot is an ErrGuest before the command was started.
var errBoot = fmt.Errorf("%w while it booted", ErrGuest)

// Job is a command for a guest. Only Args must be given.
type Job struct {
	// Args are the program, a path or a name looked up in the guest's PATH, and
	// its arguments.
	Args []string
	// Env is its environment; nil: PATH and HOME alone. PAGEFERRY_GUEST=1 is
	// always in it.
	Env []string
	// Dir is its working directory; "": /.
	Dir string
	// Keep are paths below /tmp that shall be there in the guest, as Dir and a
	// program with a path are: the directory of /tmp that leads to one is kept.
	Keep []string
	// Collect are files in the guest, of up to 8 MiB each, whose content is wanted.
	Collect []string
	// Stdout and Stderr get what it writes, as it does; nil discards. They are
	// not used at the same time, nor after Run has returned.
	Stdout, Stderr io.Writer
	// Limit is how long it may take, from its start; 0: DefaultLimit. Booting
	// has a limit of its own.
	Limit time.Duration
	// Memory is the guest's in MiB; 0: DefaultMemory.
	Memory int
	// CPUs of the guest; 0: 2.
	CPUs int
}

// Result is how a command ended that was started.
type Result struct {
	Code   int            // exit status; 0 where a signal ended it
	Signal syscall.Signal // that ended it, or 0
	// Files has the content of those of Job.Collect that were there.
	Files map[string][]byte
	// Boot is how long it took until the command was started, Ran from then on.
	Boot, Ran time.Duration
}

// Inside reports whether this process runs in a guest.
func Inside() bool { return inside() }

// Run runs a command in a guest of its own and returns how it ended. The error
// tells why there is no such thing: the command could not be started, took
// longer than its limit (context.DeadlineExceeded), ctx ended, or the guest
// failed (ErrGuest); then what the console said last is in it. When Run returns
// the guest is gone, and so it is when this process dies.
//
// It may be called at the same time by many; each has a guest of its own.
func Run(ctx context.Context, job Job) (Result, error) {
	image, err := Prepare(ctx)
	if err != nil {
		return Result{}, err
	}
	job, err = job.complete()
	if err != nil {
		return Result{}, err
	}
	for tries := 1; ; tries++ {
		r, err := once(ctx, image, job)
		// Emulation has its flaws. Of a command that was not started nothing is lost.
		if errors.Is(err, errBoot) && tries < bootTries {
			continue
		}
		return r, err
	}
}

// once is one try of Run.
func once(ctx context.Context, image Image, job Job) (Result, error) {
	// The machine dies with the thread that started it (see machine), so that
	// thread must not end before.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m, err := boot(image, job)
	if err != nil {
		return Result{}, err
	}
	defer m.kill()
	return m.run(ctx, job)
}

func (j Job) complete() (Job, error) {
	if len(j.Args) == 0 {
		return j, errors.New("vm: no command given")
	}
	if j.Env == nil {
		j.Env = []string{"PATH=" + DefaultPath, "HOME=/root"}
	}
	if j.Stdout == nil {
		j.Stdout = io.Discard
	}
	if j.Stderr == nil {
		j.Stderr = io.Discard
	}
	if j.Limit == 0 {
		j.Limit = DefaultLimit
	}
	if j.Memory == 0 {
		j.Memory = DefaultMemory
	}
	if j.CPUs == 0 {
		j.CPUs = 2
	}
	j.Keep = append([]string{j.Dir, j.Args[0]}, j.Keep...)
	return j, nil
}

// run says to a machine what to do and follows it to its end.
func (m *machine) run(ctx context.Context, job Job) (Result, error) {
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	limit := time.AfterFunc(bootLimit, func() {
		cancel(fmt.Errorf("the guest did not boot within %v: %w", bootLimit, context.DeadlineExceeded))
	})
	defer func() { limit.Stop() }()
	// Killing it ends the reading below.
	defer context.AfterFunc(ctx, m.kill)()

	failed := func(err error) (Result, error) {
		m.kill()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return Result{}, fmt.Errorf("vm: %q: %w%s", job.Args, err, m.said())
	}
	err := link.WriteJSON(m.in, link.KindStart, link.Start{
		Args: job.Args, Env: job.Env, Dir: job.Dir, Keep: job.Keep, Collect: job.Collect,
	})
	if err != nil {
		return failed(fmt.Errorf("%w: %w", errBoot, err))
	}
	r := Result{Files: map[string][]byte{}}
	for {
		kind, payload, err := link.Read(m.out)
		if err != nil {
			if r.Boot == 0 {
				return failed(fmt.Errorf("%w: %w", errBoot, err))
			}
			return failed(fmt.Errorf("%w: it ended too early: %w", ErrGuest, err))
		}
		switch kind {
		case link.KindStarted:
			r.Boot = time.Since(began)
			if limit.Stop() {
				limit = time.AfterFunc(job.Limit, func() {
					cancel(fmt.Errorf("it ran longer than %v: %w", job.Limit, context.DeadlineExceeded))
				})
			}
		case link.KindStdout:
			_, err = job.Stdout.Write(payload)
		case link.KindStderr:
			_, err = job.Stderr.Write(payload)
		case link.KindFile:
			var f link.File
			err = json.Unmarshal(payload, &f)
			r.Files[f.Name] = f.Data
		case link.KindFailed:
			m.off()
			return Result{}, fmt.Errorf("vm: %q in the guest: %s", job.Args, payload)
		case link.KindEnded:
			var e link.Ended
			err = json.Unmarshal(payload, &e)
			r.Code, r.Signal = e.Code, syscall.Signal(e.Signal)
			r.Ran = time.Since(began) - r.Boot
			if err == nil {
				m.off()
				return r, nil
			}
		default:
			err = fmt.Errorf("%w: a frame of kind %d", ErrGuest, kind)
		}
		if err != nil {
			return failed(err)
		}
	}
}
