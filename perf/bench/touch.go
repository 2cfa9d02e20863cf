package bench

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// TouchSource is the C program that touches pages. It is in C because a thread
// that waits for a page must not hold up the one that looks at the clock, as a
// runtime would.
//
//go:embed testdata/touch.c
var TouchSource string

// RawFault is the parts of a demand fault with nothing of ours between them, as
// the waiting thread sees them: a local userfaultfd served by a second thread of
// the same process, and a page asked for over loopback TCP with blocking sockets
// (64 bytes one way, a page and 64 bytes the other).
type RawFault struct{ Uffd, PingPong []time.Duration }

// MeasureRawFault measures each part n times. touch is the compiled
// TouchSource.
func MeasureRawFault(ctx context.Context, touch string, n int) (r RawFault, err error) {
	if r.Uffd, err = touchTimes(ctx, touch, "local", n); err == nil {
		r.PingPong, err = touchTimes(ctx, touch, "pingpong", n)
	}
	return r, err
}

func touchTimes(ctx context.Context, touch, mode string, n int) ([]time.Duration, error) {
	out, err := exec.CommandContext(ctx, touch, mode, strconv.Itoa(n)).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("touch %s: %w: %s", mode, err, out)
	}
	ds, err := nanoseconds(strings.Fields(string(out)))
	if err == nil && len(ds) != n {
		err = fmt.Errorf("%d times, not %d", len(ds), n)
	}
	if err != nil {
		return nil, fmt.Errorf("touch %s: %w", mode, err)
	}
	return ds, nil
}

func nanoseconds(words []string) ([]time.Duration, error) {
	ds := make([]time.Duration, len(words))
	for i, w := range words {
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return nil, err
		}
		ds[i] = time.Duration(n)
	}
	return ds, nil
}

// Touched is what the touching program saw after a move.
type Touched struct {
	Hits   int             // pages that were there already
	Faults []time.Duration // how long each other touch took
}

// Toucher starts the program that touches all of its size bytes after every
// move, with that many threads.
func (s *Stage) Toucher(ctx context.Context, touch string, size uint64, threads int) (*Guest, error) {
	g, p, err := s.Start(touch, "move", strconv.FormatUint(size>>20, 10), strconv.Itoa(threads))
	if err == nil {
		err = g.said(ctx, p, "ready", time.Minute)
	}
	if err != nil {
		return nil, fmt.Errorf("touch: %w", err)
	}
	return g, nil
}

// Touched waits until g, a Toucher, has touched everything after its latest
// move, the moves-th.
func (g *Guest) Touched(ctx context.Context, moves int) (t Touched, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(g.Out)
		if err != nil {
			return t, err
		}
		lines := strings.SplitAfter(string(b), "\n")
		if len(lines) > moves && strings.HasSuffix(lines[moves], "\n") { // the first says "ready"
			return parseTouched(lines[moves], g.Host.Name())
		}
		select {
		case <-ctx.Done():
			return t, fmt.Errorf("touch: it has not said what it saw: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func parseTouched(line, host string) (t Touched, err error) {
	words := strings.Fields(line)
	if len(words) < 3 || words[0] != "moved" || words[1] != host {
		return t, fmt.Errorf("touch: %.80q is not understood", line)
	}
	t.Hits, err = strconv.Atoi(words[2])
	if err == nil {
		t.Faults, err = nanoseconds(words[3:])
	}
	if err != nil {
		err = errors.New("touch: " + err.Error())
	}
	return t, err
}
