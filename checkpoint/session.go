package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Options is how a process is taken. The zero value refuses established TCP
// connections.
type Options struct {
	// TCPClose carries established TCP connections as reset ones.
	TCPClose bool
	// Addresses maps addresses of this host to those of the destination.
	Addresses map[string]string
	Log       *slog.Logger // nil discards
}

// groupPrefix begins the name of the child cgroup; pid and start time follow, so
// that a restarted daemon knows it again.
const groupPrefix = "pageferry-"

// Session is one process at the source. See the package comment for its states.
type Session struct {
	pid   int
	start uint64 // clock ticks after boot
	opt   Options
	log   *slog.Logger
	pidfd int

	mem     atomic.Pointer[proc.Memory] // set from Freeze or Userfault on
	windows atomic.Pointer[[]window]    // see Windows
	files   atomic.Pointer[mappedFiles] // from Capture on, while it stands still

	mu       sync.Mutex
	own      cgroup.Group // where the process was and goes back to
	child    cgroup.Group
	hasGroup bool // own and child are known
	claim    int  // descriptor by which child is ours, -1 for none
	isolated bool
	held     bool // child was told to freeze
	killed   bool
	closed   bool
	tr       *proc.Tracer
	threads  []*thread     // ptrace-stopped, the leader first
	patience time.Duration // how long each of them may take to stop; 0 means stopLimit
	since    time.Time     // when Freeze stopped them
	stopped  bool          // by a stop signal, before the freeze
	stopSig  unix.Signal
	waits    map[int]wait // calls that Pause has interrupted, by thread; nil before
	survey   *survey
	reading  chan struct{} // closed at the end of what SurveyBeside began; nil where that is over
	signals  *signalSets   // what the image has of them; nil before Capture
	find     Finder        // see Userfault; nil where nothing is tracked
	program  []byte        // the auxiliary vector when tracking began
}

// thread is one that we have stopped.
type thread struct {
	tid     int
	deliver unix.Signal // with which it leaves its stop
}

// Open looks at a process and takes handles; it changes nothing. The errors say
// why it cannot be taken: ErrNoProcess, ErrKernelThread, ErrSelf, ErrThread,
// ErrZombie, ErrTraced.
// ErrHeld and ErrBusy: it is in the hands of another session.
func Open(pid int, opt Options) (*Session, error) {
	s, err := open(pid, opt)
	if err == nil && s.isolated {
		var told bool
		if told, err = s.child.Freezing(); err == nil && told {
			err = ErrHeld
		}
		if err != nil {
			s.Close()
		}
	}
	if err != nil {
		return nil, &Error{"open", pid, err}
	}
	return s, nil
}

func open(pid int, opt Options) (*Session, error) {
	if pid <= 0 {
		return nil, ErrNoProcess
	}
	if pid == os.Getpid() {
		return nil, ErrSelf
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch err {
	case nil:
	case unix.ESRCH:
		return nil, ErrNoProcess
	case unix.EINVAL, unix.ENOENT: // ENOENT since 6.15
		return nil, threadOr(pid, err)
	default:
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	s := &Session{pid: pid, opt: opt, log: opt.Log, pidfd: pidfd, claim: -1}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.look(); err != nil {
		_ = unix.Close(pidfd)
		if errors.Is(err, proc.ErrGone) {
			err = ErrNoProcess
		}
		return nil, err
	}
	return s, nil
}

// threadOr is ErrThread if pid is a thread of some process.
func threadOr(pid int, err error) error {
	st, serr := proc.ReadStatus(pid)
	switch {
	case errors.Is(serr, proc.ErrGone):
		return ErrNoProcess
	case serr == nil && st.TGID == os.Getpid():
		return ErrSelf
	case serr == nil && st.TGID != pid:
		return fmt.Errorf("%w: %d", ErrThread, st.TGID)
	}
	return os.NewSyscallError("pidfd_open", err)
}

func (s *Session) look() error {
	st, err := proc.ReadStat(s.pid)
	if err != nil {
		return err
	}
	switch {
	case st.KernelThread():
		return ErrKernelThread
	case st.State == 'Z' || st.State == 'X':
		return ErrZombie
	}
	s.start = st.StartTime
	status, err := proc.ReadStatus(s.pid)
	if err != nil {
		return err
	}
	if status.TracerPID != 0 {
		return fmt.Errorf("%w (tracer: process %d)", ErrTraced, status.TracerPID)
	}
	g, err := cgroup.Of(s.pid)
	if errors.Is(err, cgroup.ErrNoTree) || errors.Is(err, cgroup.ErrOutside) {
		return nil // Isolate says so
	}
	if err != nil {
		return err
	}
	s.hasGroup = true
	if g.Name() == s.groupName() {
		// Left by a daemon that ended in the middle.
		s.own, s.child = g.Parent(), g
		if err := s.claimChild(); err != nil {
			return err
		}
		s.isolated = true
	} else {
		s.own = g
	}
	return nil
}

// claimChild locks the child cgroup's directory. What one session has isolated
// another must not move or thaw: it may belong to another host by now. The lock
// ends with the session, or with the program.
func (s *Session) claimChild() error {
	fd, err := unix.Open(s.child.Dir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: s.child.Dir(), Err: err}
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = unix.Close(fd)
		if err == unix.EWOULDBLOCK {
			return ErrBusy
		}
		return fmt.Errorf("lock cgroup %s: %w", s.child.Dir(), err)
	}
	s.claim = fd
	return nil
}

// unclaim ends that.
func (s *Session) unclaim() {
	if s.claim >= 0 {
		_ = unix.Close(s.claim)
		s.claim = -1
	}
}

func (s *Session) groupName() string { return fmt.Sprintf("%s%d-%d", groupPrefix, s.pid, s.start) }

// Reattach finds again a process that an earlier session, of a program that has
// ended since, may have isolated or held. A held one can be read, thawed and
// killed; one that was not held is as after Open or Isolate.
func Reattach(ctx context.Context, pid int, opt Options) (*Session, error) {
	s, err := open(pid, opt)
	if err != nil {
		return nil, &Error{"reattach to", pid, err}
	}
	if err := s.resume(ctx); err != nil {
		s.Close()
		return nil, &Error{"reattach to", pid, err}
	}
	return s, nil
}

func (s *Session) resume(ctx context.Context) error {
	if !s.isolated {
		if !s.hasGroup {
			return nil
		}
		// Made by a daemon that ended before it moved the process there.
		return cgroup.At(filepath.Join(s.own.Dir(), s.groupName())).Remove(ctx)
	}
	told, err := s.child.Freezing()
	if err != nil || !told {
		return err
	}
	// The group may have been told to freeze just before its teller ended.
	if err := s.child.AwaitFrozen(ctx); err != nil {
		return err
	}
	m, err := proc.OpenMemory(s.pid)
	if err != nil {
		return err
	}
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		return errors.Join(err, m.Close())
	}
	s.mem.Store(m)
	look := &survey{pid: s.pid, ids: map[mappedKey]image.FileID{}}
	s.setFiles(listMappedFiles(s.pid, maps, look.fileID))
	s.held = true
	return nil
}

// LeftGroup reports whether a cgroup directory is one that a session made, and
// for which process.
func LeftGroup(name string) (pid int, start uint64, ok bool) {
	rest, ok := strings.CutPrefix(name, groupPrefix)
	if !ok {
		return 0, 0, false
	}
	if n, err := fmt.Sscanf(rest, "%d-%d", &pid, &start); n != 2 || err != nil || fmt.Sprintf("%d-%d", pid, start) != rest {
		return 0, 0, false
	}
	return pid, start, true
}

// PID is the process's number on this host, StartTime its start in clock ticks
// after boot: together they name it for ever.
func (s *Session) PID() int          { return s.pid }
func (s *Session) StartTime() uint64 { return s.start }

// Held reports whether the process is held by its frozen cgroup.
func (s *Session) Held() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

// Group is the directory of the child cgroup; empty before Isolate.
func (s *Session) Group() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isolated {
		return ""
	}
	return s.child.Dir()
}

// ReadPages copies the pages of rs, one after the other, into buf. It may be
// called from any goroutine after Freeze or Userfault, and does not touch the process.
//
// Spaces from page.FirstFileSpace on are the files of Image.MappedFiles. They can be
// read after Capture, and of a process that was found held.
func (s *Session) ReadPages(space page.Space, rs []page.Range, buf []byte) error {
	if space >= page.FirstFileSpace {
		return s.readFile(int(space-page.FirstFileSpace), rs, buf)
	}
	m := s.mem.Load()
	if m == nil || space != 0 {
		return &Error{"read pages of", s.pid, ErrState}
	}
	return s.readPages(m, rs, buf)
}

// Close lets go of every handle. A process that is stopped by ptrace runs on; one
// that is held stays held. Idempotent.
func (s *Session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	_ = s.letGo()
	s.awaitReading()
	if s.tr != nil {
		s.tr.Close()
		s.tr = nil
	}
	s.closeMemory()
	s.unclaim()
	return unix.Close(s.pidfd)
}

// closeMemory ends reading, of files too, also for those who are at it.
func (s *Session) closeMemory() {
	if m := s.mem.Swap(nil); m != nil {
		_ = m.Close()
	}
	s.closeWindows()
	s.setFiles(nil)
}
