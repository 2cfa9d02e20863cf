package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Exit ends a held process as if it had called exit_group(status), so that its
// parent sees an end in good order. Not one instruction of the program runs: all
// threads, still frozen, get registers that say exit_group and a mask that blocks
// every signal, and only when the last has them the cgroup is thawed. If that
// fails in the middle the process stays held, and Kill is the way.
func (s *Session) Exit(ctx context.Context, status int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.exit(ctx, status); err != nil {
		return &Error{"end", s.pid, err}
	}
	return nil
}

func (s *Session) exit(ctx context.Context, status int) error {
	if err := s.usable(); err != nil {
		return err
	}
	if !s.held {
		return fmt.Errorf("%w: only a held process can be ended so", ErrState)
	}
	call, err := s.syscallInstruction()
	if err != nil {
		return err
	}
	if s.tr == nil {
		s.tr = proc.NewTracer()
	}
	s.tr.Do(func() {
		if err = s.seizeAll(ctx, false); err != nil {
			return
		}
		for _, t := range s.threads {
			t.deliver = 0
			if err = exitNext(t.tid, call, status); err != nil {
				err = fmt.Errorf("thread %d: %w", t.tid, err)
				return
			}
		}
	})
	inject.Point("exit prepared")
	s.letGo()
	if err != nil {
		return err
	}
	if err := s.child.Thaw(); err != nil {
		return err
	}
	if s.stopped {
		// Ends the stop; its handler, if there is one, is blocked.
		_ = unix.PidfdSendSignal(s.pidfd, unix.SIGCONT, nil, 0)
	}
	s.killed, s.held = true, false
	s.closeMemory()
	if err := s.awaitEnd(ctx); err != nil {
		return err
	}
	if err := s.child.Remove(ctx); err != nil {
		return err
	}
	s.unclaim()
	s.isolated = false
	return nil
}

// exitNext makes exit_group the next thing that a stopped thread does.
func exitNext(tid int, call uint64, status int) error {
	if err := sys.PtraceSetSigmask(tid, ^uint64(0)); err != nil {
		return err
	}
	var r sys.Regs
	if err := sys.PtraceGetRegs(tid, &r); err != nil {
		return err
	}
	r.Rip, r.Rax, r.Rdi = call, unix.SYS_EXIT_GROUP, uint64(status)
	r.Orig_rax = ^uint64(0) // no call to restart
	return sys.PtraceSetRegs(tid, &r)
}

// syscallInstruction finds one in the vdso, which every process can execute.
func (s *Session) syscallInstruction() (uint64, error) {
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		return 0, err
	}
	for _, m := range maps {
		if m.Name != "[vdso]" {
			continue
		}
		buf := make([]byte, m.Bytes())
		if err := s.mem.Load().ReadAt(buf, m.Start); err != nil {
			return 0, err
		}
		if i := bytes.Index(buf, []byte{0x0f, 0x05}); i >= 0 {
			return uint64(m.Start) + uint64(i), nil
		}
	}
	return 0, errors.New("no system call instruction in its vdso")
}
