package fault

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// Recover applies the messages that a pager, killed since, had read and not
// applied, and makes every waiting thread fault again, because those whose
// fault was read would wait for ever. adopt fetches a descriptor of the former
// pager and gives it a number of its own from FirstFD on. The spaces must have
// their userfaultfds. Call it before Run.
func (t *Trap) Recover(adopt func(fd int) (int, error)) {
	for _, sp := range t.st.Spaces() {
		if !sp.Lock() {
			continue
		}
		if sp.Pending() > 0 {
			t.sort(sp, 0, nil)
			// What else is on its way has to be read before it is settled.
			for tries := 0; !t.settle(sp, adopt); pause(&tries) {
				if err := t.read(sp); err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
					t.log.Error("userfaultfd cannot be read", "pid", sp.PID(), "err", err)
					break
				}
			}
		}
		sp.Unlock()
	}
	t.batch = batch{}
	t.settledNow = false
	for _, sp := range t.st.Spaces() {
		if sp.FD() >= 0 {
			_ = sys.UffdWake(sp.FD(), lowest, highest-lowest)
		}
	}
}

// Poison makes every missing page raise SIGBUS when it is touched, also where a
// thread waits for it already. It is for a source that is lost for good, and
// cannot be undone.
func (t *Trap) Poison() error {
	t.st.SetFlag(pagestore.FlagPoisoned)
	var failed error
	for _, sp := range t.st.Spaces() {
		for tries := 0; ; {
			err := t.poisonSpace(sp)
			if errors.Is(err, unix.EAGAIN) {
				pause(&tries)
				continue
			}
			if errors.Is(err, unix.ESRCH) {
				t.forget(sp)
			} else if err != nil {
				failed = errors.Join(failed, fmt.Errorf("fault: poison memory of pid %d: %w", sp.PID(), err))
			}
			break
		}
	}
	t.recheck()
	return failed
}

func (t *Trap) poisonSpace(sp *pagestore.Space) (err error) {
	if !sp.RLock() {
		return nil
	}
	defer sp.RUnlock()
	if sp.Flux() {
		return unix.EAGAIN
	}
	sp.EachMissing(func(tg pagestore.Target) bool {
		for a, i := tg.Dst.Start, tg.First; a < tg.Dst.End; {
			var n int64
			n, err = sys.UffdPoison(sp.FD(), uint64(a), uint64(tg.Dst.End-a), 0)
			if n == 0 && (errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT)) {
				// A page is there, or the mapping is not in one piece.
				if changing(sp) {
					err = unix.EAGAIN
					return false
				}
				n, err = sys.UffdPoison(sp.FD(), uint64(a), page.Size, 0)
				if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT) {
					n, err = page.Size, nil
				}
			}
			if n == 0 {
				return false
			}
			err = nil
			sp.Settle(i, i+int(n>>page.Shift))
			a, i = a+page.Addr(n), i+int(n>>page.Shift)
		}
		return true
	})
	return err
}

// Leave ends the trap for good after the last page: it unregisters everything
// and closes the userfaultfds, so that plain memory is left. Missing pages would
// become zeros, so it refuses while there is one. Run must have ended.
func (t *Trap) Leave() error {
	if n := t.st.Missing(true); n != 0 {
		return fmt.Errorf("fault: %d pages are missing", n)
	}
	for _, sp := range t.st.Spaces() {
		if sp.FD() >= 0 {
			// The close below does it too, unless someone kept a copy: then the
			// program would wait for a reader that is gone.
			for _, r := range sp.Trapped() {
				_ = sys.UffdUnregister(sp.FD(), uint64(r.Start), r.Bytes())
			}
		}
		t.forget(sp)
	}
	return nil
}
