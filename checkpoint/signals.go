package checkpoint

import (
	"fmt"
	"math/bits"
	"strings"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// signalSets is which signals the image has, as sets: bit n-1 is signal n.
type signalSets struct {
	shared  uint64
	threads map[int]uint64 // by tid on this host
	timers  uint64         // that its own timers send: they go off at the destination too
	passed  uint64         // from outside during the capture; given back when it was let go of
}

// takeSignals notes what the image has.
func (c *capture) takeSignals() {
	g := &signalSets{shared: setOf(c.p.Pending), threads: make(map[int]uint64, len(c.p.Threads))}
	for i := range c.p.Threads {
		t := &c.p.Threads[i]
		g.threads[t.HostTID] = setOf(t.Pending)
	}
	g.timers = sys.SigBit(int(unix.SIGALRM)) | sys.SigBit(int(unix.SIGVTALRM)) | sys.SigBit(int(unix.SIGPROF))
	for _, t := range c.p.PosixTimers {
		if t.Notify != sys.SigevNone && t.Signal > 0 {
			g.timers |= sys.SigBit(int(t.Signal))
		}
	}
	for _, th := range c.s.threads {
		if th.deliver != 0 {
			g.passed |= sys.SigBit(int(th.deliver))
		}
	}
	if c.s.stopSig != 0 {
		g.passed |= sys.SigBit(int(c.s.stopSig))
	}
	c.s.signals = g
}

func setOf(infos [][]byte) (set uint64) {
	for _, b := range infos {
		if i, ok := sys.FromBytes[sys.Siginfo](b); ok {
			set |= sys.SigBit(i.Signo())
		}
	}
	return set
}

// Signaled is an *Error that wraps ErrSignaled if a signal for the held process
// has come since its state was captured: the image lacks it, and only Thaw lets
// the process have it. Sets are compared: a second one of a real-time signal that
// was pending already is not told from the first.
func (s *Session) Signaled() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.signaled(); err != nil {
		return &Error{"look for signals of", s.pid, err}
	}
	return nil
}

func (s *Session) signaled() error {
	g := s.signals
	if err := s.usable(); err != nil || g == nil {
		return err
	}
	fresh := g.passed
	for tid, had := range g.threads {
		st, err := proc.ReadThreadStatus(s.pid, tid)
		if err != nil {
			return err
		}
		fresh |= (st.SigPending&^had | st.SharedPending&^g.shared) &^ s.harmless(st)
	}
	if fresh &^= g.timers; fresh == 0 {
		return nil
	}
	var names []string
	for ; fresh != 0; fresh &= fresh - 1 {
		names = append(names, signalName(unix.Signal(bits.TrailingZeros64(fresh)+1)))
	}
	return fmt.Errorf("%w (%s)", ErrSignaled, strings.Join(names, ", "))
}

// harmless are the signals that vanish when the thread looks at them. While it
// is traced the kernel queues even these.
func (s *Session) harmless(st *proc.Status) uint64 {
	byDefault := sys.SigBit(int(unix.SIGCHLD)) | sys.SigBit(int(unix.SIGURG)) | sys.SigBit(int(unix.SIGWINCH))
	if !s.stopped { // else it ends the stop
		byDefault |= sys.SigBit(int(unix.SIGCONT))
	}
	return (st.SigIgnored | byDefault&^st.SigCaught) &^ st.SigBlocked
}

func signalName(sig unix.Signal) string {
	if n := unix.SignalName(sig); n != "" {
		return n
	}
	return fmt.Sprintf("signal %d", int(sig))
}
