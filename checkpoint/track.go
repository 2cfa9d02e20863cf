package checkpoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// ErrExec: the process has called exec since its memory was tracked.
var ErrExec = errors.New("the process has become another program (exec)")

// Finder finds the pages of the process's own in the private anonymous mappings of
// maps, which are all that it has, and the guards among them, in place of the walk
// that Capture makes.
type Finder func(maps []proc.Mapping) (own, guards page.Set, err error)

// Track prepares for the pages of the running process to be copied: from now on
// Capture asks find what there is, and ReadPages works while the process runs. A
// Freeze after the process has become another program fails with ErrExec.
func (s *Session) Track(find Finder) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err = s.usable(); err == nil {
		if err = s.openMemory(); err == nil {
			s.program, err = s.auxv()
		}
	}
	if err != nil {
		return &Error{"track", s.pid, err}
	}
	s.find = find
	return nil
}

// Userfault makes the running process open a userfaultfd, takes it over and leaves
// none behind: the call that closes the process's own copy is made by the process
// itself, whatever becomes of this program. The process stands still for some
// milliseconds. The caller owns the descriptor.
//
// It is made with UFFD_USER_MODE_ONLY, which every process may, and serves for
// write protection without a handler: userfaultfd(2).
func (s *Session) Userfault(ctx context.Context) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := s.userfault(ctx)
	if err != nil {
		return nil, &Error{"open a userfaultfd in", s.pid, err}
	}
	return f, nil
}

// Untracked takes back what Userfault was told, where the caller cannot use the
// descriptor: Capture finds what there is by itself.
func (s *Session) Untracked() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.find, s.program = nil, nil
}

func (s *Session) userfault(ctx context.Context) (*os.File, error) {
	// The moment in which the descriptor can be fetched. On a busy host it may not
	// be enough.
	for pause := 2 * time.Millisecond; ; pause *= 4 {
		f, err := s.tryUserfault(ctx, pause)
		if !errors.Is(err, unix.EBADF) || pause > 200*time.Millisecond {
			return f, err
		}
	}
}

func (s *Session) tryUserfault(ctx context.Context, pause time.Duration) (_ *os.File, err error) {
	if err := s.freeze(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.letGo()) }()
	leader := s.threads[0].tid
	t, err := inject.Bootstrap(s.tr, s.pid, leader)
	if err != nil {
		return nil, err
	}
	b := t.Batch()
	number := b.Space(8)
	made := b.Call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|sys.UffdUserModeOnly)
	// Never 0, which is what stands there before.
	copied := b.Call(unix.SYS_FCNTL, 0, unix.F_DUPFD_CLOEXEC, 3).Arg(0, made).StoreAt(number.Addr())
	ts := binary.LittleEndian.AppendUint64(make([]byte, 8), uint64(pause)) // struct timespec
	b.Call(unix.SYS_NANOSLEEP, b.Bytes(ts), 0).Optional()
	b.Call(unix.SYS_CLOSE, 0).Arg(0, copied)
	b.Call(unix.SYS_CLOSE, 0).Arg(0, made)
	ran, fetched := make(chan error, 1), make(chan struct{})
	var f *os.File
	var ferr error
	go func() {
		defer close(fetched)
		f, ferr = s.fetch(page.Addr(number.Addr()), ran, "anon_inode:[userfaultfd]")
	}()
	err = b.Run(leader)
	close(ran)
	<-fetched
	inject.Point("userfault")
	err = errors.Join(err, s.closeTarget(t))
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		if errors.Is(err, unix.ENOSYS) {
			err = &sys.NotSupported{Feature: "userfaultfd", Since: "4.3", Err: err}
		}
		return nil, err
	}
	return f, ferr
}

// closeTarget ends injected work, and keeps the signals that came meanwhile for when
// the threads leave their stop.
func (s *Session) closeTarget(t *inject.Target) error {
	err := t.Close(s.threads[0].tid)
	for _, th := range s.threads {
		if sig := t.Deliver(th.tid); sig != 0 {
			th.deliver = sig
		}
	}
	if sig := t.Stopped(); sig != 0 {
		s.stopSig = sig
	}
	return err
}

// fetch takes over the descriptor whose number appears at at, of that kind, until ran
// is closed: then the process has closed its own, and EBADF says that it was too late.
func (s *Session) fetch(at page.Addr, ran <-chan error, kind string) (*os.File, error) {
	m := s.mem.Load()
	var b [8]byte
	for {
		if err := m.ReadAt(b[:], at); err != nil {
			return nil, err
		}
		if n := binary.LittleEndian.Uint64(b[:]); n != 0 {
			fd, err := unix.PidfdGetfd(s.pidfd, int(n), 0)
			if err != nil {
				return nil, os.NewSyscallError("pidfd_getfd", err)
			}
			f := os.NewFile(uintptr(fd), kind)
			// The number may have been closed and used again meanwhile.
			if is, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); !strings.HasPrefix(is, kind) {
				_ = f.Close()
				return nil, fmt.Errorf("descriptor %d of the process: %w", n, errors.Join(err, unix.EBADF))
			}
			return f, nil
		}
		select {
		case <-ran:
			return nil, unix.EBADF
		default:
			// Not time.Sleep: the runtime's poller counts in milliseconds.
			ts := unix.NsecToTimespec(int64(20 * time.Microsecond))
			_ = unix.Nanosleep(&ts, nil)
		}
	}
}

// auxv tells one program from the next where the kernel randomizes: it holds where
// the kernel put it, and the place of its random bytes.
func (s *Session) auxv() ([]byte, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", s.pid))
	return b, proc.Gone(s.pid, err)
}

// sameProgram fails with ErrExec where the process is not what Userfault saw.
func (s *Session) sameProgram() error {
	if s.find == nil {
		return nil
	}
	now, err := s.auxv()
	if err == nil && (!bytes.Equal(now, s.program) || errors.Is(s.mem.Load().Alive(), proc.ErrGone)) {
		err = ErrExec
	}
	return err
}

// Mappings are those that the process has now, with their flags as far as they
// are known without a long walk; see Survey. It runs.
func (s *Session) Mappings() ([]proc.Mapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.usable()
	var maps []proc.Mapping
	if err == nil && s.survey == nil {
		s.survey, err = takeSurvey(s.pid)
	}
	if err == nil {
		maps, err = s.survey.mappings()
	}
	if err != nil {
		return nil, &Error{"read the mappings of", s.pid, err}
	}
	// Something new was walked for: it is not walked for again.
	s.survey.maps = maps
	return maps, nil
}
