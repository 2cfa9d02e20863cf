package appliance

import (
	"bytes"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// A pager that is not to be had now is asked for again, until the arrival is over: nobody
// else may need one, and the process stand still for want of it.
func TestReplaceGoesOn(t *testing.T) {
	dir := t.TempDir() // no pager has been there, which no attempt gets over
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := &arrival{dir: dir, host: &host{}, log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError}))}
		over := make(chan struct{})
		go func() {
			defer close(over)
			a.replace(nil)
		}()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		select {
		case <-over:
			t.Fatalf("it was given up:\n%s", &log)
		default:
		}
		if n := bytes.Count(log.Bytes(), []byte("no pager could take over yet")); n < 3 || n > 20 {
			t.Errorf("%d attempts in 10 s:\n%s", n, &log)
		}
		a.mu.Lock()
		a.done = true
		a.mu.Unlock()
		<-over
	})
}
