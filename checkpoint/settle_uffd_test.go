package checkpoint

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

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
			f := v.userfault(t)
			fd := int(f.Fd())
			if _, _, err := sys.UffdAPI(fd, sys.UffdFeatureEventFork|sys.UffdFeatureEventRemap|sys.UffdFeatureEventRemove|
				sys.UffdFeatureEventUnmap|sys.UffdFeatureWPAsync|sys.UffdFeatureWPUnpopulated); err != nil {
				t.Fatal(err)
			}
			var remaps atomic.Int64
			ended := make(chan struct{})
			stop := make(chan struct{})
			go func() {
				defer close(ended)
				readEvents(f, page.NewSet(v.shadows()...), &remaps, stop)
			}()
			defer func() {
				close(stop)
				<-ended
				_ = f.Close()
			}()
			for _, r := range v.regions {
				// The program has taken single pages out by now: those between them.
				for at := page.Addr(0); at < page.Addr(r.bytes); at += page.Size {
					_, _ = sys.UffdRegister(fd, uint64(r.v+at), page.Size, sys.UffdioRegisterModeWP)
				}
				if _, err := sys.UffdRegister(fd, uint64(r.s), r.bytes, sys.UffdioRegisterModeMissing); err != nil {
					t.Fatal(err)
				}
				// What was zero has never come.
				for at := page.Addr(0); at < page.Addr(r.bytes); at += page.Size {
					_, _ = sys.UffdZeropage(fd, uint64(r.s+at), page.Size, 0)
				}
			}
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

// userfault takes over the descriptor that the program has opened.
func (v *veiled) userfault(t testing.TB) *os.File {
	t.Helper()
	n := -1
	for line := range strings.Lines(v.Text()) {
		_, _ = fmt.Sscanf(line, "uffd %d", &n)
	}
	pidfd, err := unix.PidfdOpen(v.Pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		t.Fatal(n, err)
	}
	return os.NewFile(uintptr(fd), "userfaultfd")
}

func (v *veil) shadows() (s []page.Range) {
	for _, r := range v.regions {
		s = append(s, page.Range{Start: r.s, End: r.s + page.Addr(r.bytes)})
	}
	return s
}

// readEvents reads what a userfaultfd tells, and counts moves from one of shadows.
func readEvents(f *os.File, shadows page.Set, remaps *atomic.Int64, stop chan struct{}) {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	buf := make([]byte, 16*sys.UffdMsgSize)
	for {
		select {
		case <-stop:
			return
		default:
		}
		if n, _ := sys.AwaitReady(fds, 2*time.Millisecond); n == 0 {
			continue
		}
		n, err := unix.Read(int(f.Fd()), buf)
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
				if _, err := sys.UffdZeropage(int(f.Fd()), at, page.Size, 0); err != nil {
					_ = sys.UffdWake(int(f.Fd()), at, page.Size)
				}
			}
		}
	}
}
