package checkpoint

import (
	"fmt"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// A redis-server with a client that never pauses is captured again and again, its
// tracer killed between; the client keeps its connection and gets every answer.
func TestRedisUnderLoad(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2, testutil.Program("redis-server"))
	testutil.NoLeaks(t)
	r := testutil.RedisWith(t, testutil.RedisConfig{TCP: true})
	r.Populate(20000, 100)
	client := r.Dial()
	stop, done := make(chan struct{}), make(chan error, 1)
	var answers int64
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			v, err := client.Do("INCR", "counter")
			if err != nil || v != answers+1 {
				done <- fmt.Errorf("after %d answers came %v, %v", answers, v, err)
				return
			}
			answers++
		}
	}()
	points := killPoints(t, r.Pid())
	names := sample(points)
	for i := range rounds / 2 {
		if i%2 == 0 {
			n := names[i/2%len(names)]
			killAt(t, r.Pid(), n, points[n-1])
			s, err := Reattach(t.Context(), r.Pid(), Options{})
			must(t, err)
			must(t, s.Thaw(t.Context()))
			must(t, s.Close())
			continue
		}
		s, ctx := openFor(t, r.Pid())
		s.opt.TCPClose = true
		must(t, s.Isolate(ctx))
		must(t, s.Freeze(ctx))
		img, _, err := s.Capture(ctx)
		must(t, err)
		must(t, img.Validate())
		must(t, s.Hold(ctx))
		must(t, s.Thaw(ctx))
		must(t, s.Close())
		select {
		case err := <-done:
			t.Fatal(err)
		case <-time.After(time.Millisecond):
		}
	}
	close(stop)
	must(t, <-done)
	if answers == 0 {
		t.Error("the client got no answer at all")
	}
	t.Logf("%d answers", answers)
}
