package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// guardKeeper starts another keeper when ours dies.
func (s *server) guardKeeper(pid int) {
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		s.mu.Lock()
		if s.leaving || s.ctx.Err() != nil {
			s.mu.Unlock()
			return
		}
		s.log.Warn("keeper died, starting another", "pid", pid, "status", ws)
		pid, err = cloneKeeper(s.cfg.ID.String())
		if err == nil {
			s.me.Keeper = pid
			s.me.KeeperStart, _ = startTime(pid)
			if s.cfg.KeeperCgroup != "" {
				_ = os.WriteFile(filepath.Join(s.cfg.KeeperCgroup, "cgroup.procs"), fmt.Appendf(nil, "%d", pid), 0)
			}
			err = writeState(s.cfg.Dir, s.me)
		}
		me := s.me
		s.mu.Unlock()
		if err != nil {
			s.log.Error("no keeper: a kill of the pager would lose memory", "err", err)
			if pid == 0 {
				return
			}
		}
		s.tell(eventMsg{Kind: keeperChanged, Stats: Stats{Faults: uint64(me.Keeper)}})
	}
}
