package checkpoint

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
)

// rounds is how often a program is frozen, captured and let go in one test.
const rounds = 200

// Programs that check all they hold must not notice that they were frozen and
// captured: no EINTR, no wait that ends early, no register, signal or timer lost.
func TestCaptureIsInvisible(t *testing.T) {
	type start = func(testing.TB, testutil.ProgramConfig) *testutil.SelfChecking
	for _, c := range []struct {
		name  string
		start start
		cfg   testutil.ProgramConfig
	}{
		{"everything", testutil.StartEverything, testutil.ProgramConfig{}},
		{"churn", testutil.StartChurn, testutil.ProgramConfig{Threads: 2, Args: []string{"--with", "fork"}}},
		{"Go", testutil.StartGo, testutil.ProgramConfig{}},
		{"Python", testutil.StartPython, testutil.ProgramConfig{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
			testutil.NoLeaks(t)
			r := testutil.NewRecorder(t)
			c.cfg.Recorder = r
			p := c.start(t, c.cfg)
			images := 0
			var worst, total time.Duration
			for i := range rounds {
				d, img := captureOnce(t, p.Pid(), i%4 == 0)
				if img != nil {
					images++
				}
				worst, total = max(worst, d), total+d
				p.Beat(2)
				p.Check()
			}
			p.Verify()
			r.OneOwner(0)
			if images < rounds/2 {
				t.Errorf("only %d of %d captures gave an image", images, rounds)
			}
			t.Logf("capture: mean %v, worst %v", total/rounds, worst)
		})
	}
}

// captureOnce takes a process through a session, held too if hold, and returns
// how long the capture took.
func captureOnce(t testing.TB, pid int, hold bool) (took time.Duration, img *image.Image) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := Open(pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	defer s.Thaw(context.WithoutCancel(ctx))
	if hold {
		if err := s.Isolate(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	img, mem, err := s.Capture(ctx)
	took = time.Since(began)
	var refused *fds.RefusedError
	var parent *RefusedError
	if errors.As(err, &refused) || errors.As(err, &parent) {
		// Events unread, or a child, at this moment.
		if err := s.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
		return took, nil
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Validate(); err != nil {
		t.Fatal(err)
	}
	if len(mem) != 1 || mem[0].Lazy.Empty() {
		t.Fatalf("no memory was found: %+v", mem)
	}
	if hold {
		if err := s.Hold(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	return took, img
}
