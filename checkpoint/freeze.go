package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// stopLimit is how long a thread may take to stop, where nobody says otherwise (patience).
const stopLimit = 2 * time.Second

// Isolate moves the process into a child cgroup of its own. Do it long before the
// freeze: it can cost milliseconds. Idempotent.
func (s *Session) Isolate(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.isolate(); err != nil {
		return &Error{"isolate", s.pid, err}
	}
	return nil
}

// Survey reads what costs much to read, while the process still runs, so that a
// Freeze soon after it need not. Freeze does it itself where there was none, but for
// the hashes of files. What SurveyBeside read a moment ago is not read again.
func (s *Session) Survey() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaitReading()
	if s.usable() == nil && !s.held && !s.survey.fresh() {
		s.mu.Unlock() // it can take long, and others may have to end it
		hashFiles(s.pid)
		s.mu.Lock()
	}
	err := s.usable()
	if err == nil && !s.held && !s.survey.fresh() {
		s.survey, err = takeSurvey(s.pid)
	}
	if err != nil {
		return &Error{"survey", s.pid, err}
	}
	return nil
}

func (s *Session) isolate() error {
	if err := s.usable(); err != nil || s.isolated {
		return err
	}
	if !s.hasGroup {
		_, err := cgroup.Of(s.pid) // says what is missing
		return err
	}
	child, err := s.own.Create(s.groupName())
	if err != nil {
		return err
	}
	inject.Point("isolate")
	s.child = child
	if err := s.claimChild(); err != nil {
		return err
	}
	s.isolated = true
	if err := child.Move(s.pid); err != nil {
		return errors.Join(err, s.rejoin(context.Background()))
	}
	inject.Point("isolated")
	return nil
}

// rejoin moves the process, and children that it had meanwhile, back into its own
// cgroup and removes the child group.
func (s *Session) rejoin(ctx context.Context) error {
	if !s.isolated {
		return nil
	}
	pids, err := s.child.Procs()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, pid := range append(pids, s.pid) {
		if err := s.own.Move(pid); err != nil && !errors.Is(err, proc.ErrGone) {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := s.child.Remove(ctx); err != nil {
		return err
	}
	s.unclaim()
	s.isolated = false
	return nil
}

func (s *Session) usable() error {
	switch {
	case s.closed:
		return fmt.Errorf("%w: closed", ErrState)
	case s.killed:
		return ErrKilled
	}
	return nil
}

// Freeze stops every thread, also where one takes its time. On error the process runs on.
func (s *Session) Freeze(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.freeze(ctx); err != nil {
		return &Error{"freeze", s.pid, err}
	}
	return nil
}

func (s *Session) freeze(ctx context.Context) error {
	if err := s.usable(); err != nil {
		return err
	}
	if s.held || len(s.threads) > 0 {
		return fmt.Errorf("%w: frozen already", ErrState)
	}
	s.signals = nil
	if err := s.openMemory(); err != nil {
		return err
	}
	err := s.stopPatiently(ctx, func() (err error) {
		if s.survey == nil || time.Since(s.survey.at) > surveyAge {
			s.survey, err = takeSurvey(s.pid)
		}
		return err
	})
	if err != nil {
		return err
	}
	if err = s.sameProgram(); err != nil {
		_ = s.letGo()
	}
	return err
}

// openMemory opens what ReadPages reads.
func (s *Session) openMemory() error {
	if s.mem.Load() != nil {
		return nil
	}
	m, err := proc.OpenMemory(s.pid)
	if err == nil {
		s.mem.Store(m)
	}
	return err
}

// stop makes every thread stand still in the tracer's hands. On error all run on.
func (s *Session) stop(ctx context.Context) (err error) {
	if s.tr == nil {
		s.tr = proc.NewTracer()
	}
	s.tr.Do(func() { err = s.seizeAll(ctx, false) })
	if err != nil {
		_ = s.letGo()
	}
	return err
}

// seizeAll attaches to and stops every thread, those included that appear
// meanwhile: a thread that still runs may make more. Or only the main thread. On the
// tracer's thread.
func (s *Session) seizeAll(ctx context.Context, main bool) error {
	seen := map[int]bool{}
	s.stopped, s.stopSig = false, 0
	for {
		tids := []int{s.pid}
		if !main {
			var err error
			if tids, err = proc.Threads(s.pid); err != nil {
				return err
			}
		}
		var fresh []*thread
		for _, tid := range tids {
			if seen[tid] {
				continue
			}
			ok, err := s.seize(tid)
			if err != nil {
				return err
			}
			if ok {
				seen[tid] = true
				t := &thread{tid: tid}
				fresh, s.threads = append(fresh, t), append(s.threads, t)
			}
		}
		inject.Point("seized")
		for _, t := range fresh {
			if err := s.awaitStop(ctx, t); err != nil {
				return err
			}
		}
		s.threads = slices.DeleteFunc(s.threads, func(t *thread) bool { return t.tid == 0 })
		if len(fresh) == 0 {
			break
		}
	}
	i := slices.IndexFunc(s.threads, func(t *thread) bool { return t.tid == s.pid })
	if i < 0 {
		return fmt.Errorf("its main thread has ended: %w", ErrZombie)
	}
	s.threads[0], s.threads[i] = s.threads[i], s.threads[0]
	rest := s.threads[1:]
	slices.SortFunc(rest, func(a, b *thread) int { return a.tid - b.tid })
	inject.Point("stopped")
	return nil
}

// seize attaches to one thread and asks it to stop; false if it has ended.
func (s *Session) seize(tid int) (bool, error) {
	err := sys.PtraceSeize(tid, unix.PTRACE_O_TRACESYSGOOD)
	switch err {
	case nil:
	case unix.ESRCH:
		return false, nil
	case unix.EPERM:
		st, serr := proc.ReadThreadStatus(s.pid, tid)
		switch {
		case errors.Is(serr, proc.ErrGone):
			return false, nil
		case serr == nil && st.TracerPID != 0:
			return false, fmt.Errorf("%w (tracer: process %d)", ErrTraced, st.TracerPID)
		case serr == nil && (st.State == 'Z' || st.State == 'X'):
			if tid == s.pid {
				return false, fmt.Errorf("its main thread has ended: %w", ErrZombie)
			}
			return false, nil
		}
		return false, fmt.Errorf("attach to thread %d: %w (it needs root with CAP_SYS_PTRACE)", tid, err)
	default:
		return false, fmt.Errorf("attach to thread %d: %w", tid, err)
	}
	if err := sys.PtraceInterrupt(tid); err != nil && err != unix.ESRCH {
		return false, fmt.Errorf("interrupt thread %d: %w", tid, err)
	}
	return true, nil
}

// awaitStop waits for the stop that was asked for. A signal that is about to be
// delivered is, and its handler then has not run yet when the stop comes. A
// thread that has ended gets tid 0.
func (s *Session) awaitStop(ctx context.Context, t *thread) error {
	deadline := time.Now().Add(cmp.Or(s.patience, stopLimit))
	for tries := 0; ; tries++ {
		ws, ok, err := sys.WaitStopNow(t.tid)
		switch {
		case err == unix.ECHILD:
			if t.tid != s.pid {
				_, _, _ = sys.WaitNow(t.tid) // or it stays a zombie
			}
			t.tid = 0
			return nil
		case err != nil:
			return fmt.Errorf("wait for thread %d: %w", t.tid, err)
		case !ok:
			if err := ctx.Err(); err != nil {
				return err
			}
			if time.Now().After(deadline) {
				return s.stuck(t.tid)
			}
			if tries > 2 {
				// No other way to wait with a limit: a thread in a vfork or on
				// a dead file server never stops.
				// Not time.Sleep: the runtime's poller counts in milliseconds.
				ts := unix.NsecToTimespec(int64(min(tries, 50)) * int64(10*time.Microsecond))
				_ = unix.Nanosleep(&ts, nil)
			}
			continue
		}
		tries = 0
		sig := unix.Signal(0)
		switch sys.Event(ws) {
		case unix.PTRACE_EVENT_STOP:
			if ws.StopSignal() != unix.SIGTRAP {
				s.stopped = true
			}
			return s.keepCall(t.tid)
		case 0:
			sig = ws.StopSignal()
		}
		// A stop for a signal takes the one that was asked for away, if that was asked
		// for while the signal was being fetched (ptrace_stop, kernel/signal.c; for that
		// of a POSIX timer the kernel lets go of the lock meanwhile). So it is asked for
		// again, before the thread can get anywhere.
		if err := sys.PtraceInterrupt(t.tid); err != nil && err != unix.ESRCH {
			return fmt.Errorf("interrupt thread %d: %w", t.tid, err)
		}
		if err := sys.PtraceCont(t.tid, sig); err != nil && err != unix.ESRCH {
			return fmt.Errorf("deliver %v to thread %d: %w", unix.SignalName(sig), t.tid, err)
		}
	}
}

// keepCall marks a call that fails with EINTR whenever its thread is stopped, such
// as epoll_wait, as one to be restarted: whatever happens to us from here on, the
// program does not see it.
func (s *Session) keepCall(tid int) error {
	var r sys.Regs
	err := sys.PtraceGetRegs(tid, &r)
	if err == nil {
		how := inject.Interpret(r)
		s.keepTime(tid, &how)
		if how.Kernel != r {
			err = sys.PtraceSetRegs(tid, &how.Kernel)
		}
	}
	if err != nil && err != unix.ESRCH {
		return fmt.Errorf("keep the call of thread %d: %w", tid, err)
	}
	return nil
}

// detachAll lets go of every thread. On the tracer's thread.
func (s *Session) detachAll() error {
	var errs []error
	for _, t := range s.threads {
		if t.tid == 0 {
			continue
		}
		// ESRCH: killed, or still on its way to a stop.
		if err := sys.PtraceDetach(t.tid, t.deliver); err != nil {
			errs = append(errs, fmt.Errorf("let go of thread %d: %w", t.tid, err))
		}
		inject.Point("detach")
	}
	s.threads = nil
	if s.stopSig != 0 {
		if err := unix.PidfdSendSignal(s.pidfd, s.stopSig, nil, 0); err != nil && err != unix.ESRCH {
			errs = append(errs, fmt.Errorf("pass on %v: %w", unix.SignalName(s.stopSig), err))
		}
		s.stopSig = 0
	}
	return errors.Join(errs...)
}

// letGo detaches if anything is attached. What cannot be detached is let go of by
// the end of the tracer's thread: the error only says that there was such, and
// every thread is let go of in any case.
func (s *Session) letGo() (err error) {
	if len(s.threads) == 0 {
		return nil
	}
	s.tr.Do(func() { err = s.detachAll() })
	if err != nil {
		s.log.Debug("the tracer's thread ends to let go of the process", "pid", s.pid, "error", err)
		s.tr.Close()
		s.tr = nil
	}
	return err
}
