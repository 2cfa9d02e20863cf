package checkpoint

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// The mappings are registered with a userfaultfd for write protection, their shadows
// for missing pages, as they are in a process that is arriving. Its holder unregisters
// them in each stop, or reads the events of the injected calls.
func TestSettleRegisteredMemory(t *testing.T) {
	for _, unregister := range []bool{true, false} {
		name := "events are read"
		if unregister {
			name = "unregistered"
		}
		t.Run(name, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
			testutil.NoLeaks(t)
			v := startVeiled(t, 8, 1024, 4, "uffd")
			var remaps atomic.Int64
			fd := v.trap(t, &remaps)
			cfg := v.config()
			if unregister {
				cfg.Stopped = func(ctx context.Context, parts []SettlePart) (page.Set, error) {
					for _, p := range parts {
						for _, at := range []page.Addr{p.Start, p.Shadow} {
							// EINVAL where the program has moved it to, out of sight.
							if err := sys.UffdUnregister(fd, uint64(at), p.Bytes()); err != nil && err != unix.EINVAL {
								return page.Set{}, err
							}
						}
					}
					return v.stopped(ctx, parts)
				}
			}
			rep := settleAll(t, v.Pid(), cfg, v.shadows()...)
			t.Logf("%v; %d moves of shadows were read", &rep, remaps.Load())
			if (remaps.Load() == 0) != unregister {
				t.Errorf("%d moves of shadows were read", remaps.Load())
			}
			v.finish(t)
		})
	}
}

// trap registers what the program has with its userfaultfd, the mappings for write
// protection and the shadows for missing pages, and has its events read.
func (v *veiled) trap(t testing.TB, remaps *atomic.Int64) (fd int) {
	t.Helper()
	if remaps == nil {
		remaps = new(atomic.Int64)
	}
	fd, err := openUserfault(v.Pid(), v.Text())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := sys.UffdAPI(fd, sys.UffdFeatureEventFork|sys.UffdFeatureEventRemap|sys.UffdFeatureEventRemove|
		sys.UffdFeatureEventUnmap|sys.UffdFeatureWPAsync|sys.UffdFeatureWPUnpopulated); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(ended)
		readEvents(fd, page.NewSet(v.shadows()...), remaps, stop)
	}()
	v.untrap = sync.OnceFunc(func() {
		close(stop)
		<-ended
		_ = unix.Close(fd)
	})
	t.Cleanup(v.untrap)
	for _, r := range v.regions {
		// The program has taken single pages out by now: those between them.
		if _, err := sys.UffdRegister(fd, uint64(r.v), r.bytes, sys.UffdioRegisterModeWP); err != nil {
			for at := page.Addr(0); at < page.Addr(r.bytes); at += page.Size {
				_, _ = sys.UffdRegister(fd, uint64(r.v+at), page.Size, sys.UffdioRegisterModeWP)
			}
		}
		if _, err := sys.UffdRegister(fd, uint64(r.s), r.bytes, sys.UffdioRegisterModeMissing); err != nil {
			t.Fatal(err)
		}
		// What was zero has never come.
		for at := page.Addr(0); at < page.Addr(r.bytes); at += page.Size {
			for {
				// EAGAIN: a mapping of the program is changing.
				if _, err := sys.UffdZeropage(fd, uint64(r.s+at), page.Size, 0); err != unix.EAGAIN {
					break
				}
			}
		}
	}
	return fd
}

// openUserfault takes over the descriptor that the program has opened. Not as an
// os.File: that makes it blocking, for all who have it, and a userfaultfd that blocks
// cannot be polled.
func openUserfault(pid int, text string) (int, error) {
	n := -1
	for line := range strings.Lines(text) {
		_, _ = fmt.Sscanf(line, "uffd %d", &n)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pidfd)
	return unix.PidfdGetfd(pidfd, n, 0)
}

func (v *veil) shadows() (s []page.Range) {
	for _, r := range v.regions {
		s = append(s, page.Range{Start: r.s, End: r.s + page.Addr(r.bytes)})
	}
	return s
}

// readEvents reads what a userfaultfd tells, and counts moves from one of shadows.
func readEvents(fd int, shadows page.Set, remaps *atomic.Int64, stop chan struct{}) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	buf := make([]byte, 16*sys.UffdMsgSize)
	for {
		select {
		case <-stop:
			return
		default:
		}
		if n, _ := unix.Poll(fds, 2); n <= 0 || fds[0].Revents&unix.POLLIN == 0 {
			continue
		}
		n, err := unix.Read(fd, buf)
		if err != nil {
			continue
		}
		for _, m := range sys.DecodeUffdMsgs(buf[:n], nil) {
			switch m.Event {
			case sys.UffdEventFork:
				_ = unix.Close(m.ForkFD)
			case sys.UffdEventRemap:
				if shadows.Contains(page.Addr(m.From)) {
					remaps.Add(1)
				}
			case sys.UffdEventPagefault:
				// What moved is registered still, and the program gives pages up.
				at := m.Addr &^ (page.Size - 1)
				if _, err := sys.UffdZeropage(fd, at, page.Size, 0); err != nil {
					_ = sys.UffdWake(fd, at, page.Size)
				}
			}
		}
	}
}
