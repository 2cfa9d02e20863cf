package checkpoint

import (
	"context"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
)

func TestRedisOnce(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2, testutil.Program("redis-server"))
	p := testutil.Start(t, "redis-server", "--port", "0", "--save", "", "--unixsocket", t.TempDir()+"/s")
	p.WaitText("eady to accept", 10*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Isolate(ctx); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		t0 := time.Now()
		if err := s.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		t1 := time.Now()
		img, mem, err := s.Capture(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t2 := time.Now()
		if err := img.Validate(); err != nil {
			t.Fatal(err)
		}
		b, err := image.Encode(img)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("freeze %v capture %v image %d bytes, %d vmas %d threads %d files, lazy %d eager %d hot %d pages", t1.Sub(t0), t2.Sub(t1), len(b),
			len(img.Processes[0].VMAs), len(img.Processes[0].Threads), len(img.Files), mem[0].Lazy.Pages(), mem[0].Eager.Pages(), mem[0].Hot.Pages())
		if err := s.Hold(ctx); err != nil {
			t.Fatal(err)
		}
		if err := s.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
		if err := s.Isolate(ctx); err != nil {
			t.Fatal(err)
		}
	}
}
