package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Step is how long one part of a migration took.
type Step struct {
	Name string
	Took time.Duration
}

// logBook takes a daemon's log, in slog's text form, and picks the times out.
type logBook struct {
	mu    sync.Mutex
	rest  []byte
	lines []string // since the last take
	steps []Step
	ended map[string]bool // "id role" of migrations
	// switched is when a migration's process ran at its destination.
	switched map[string]time.Time
	died     string        // of a pager that ended by itself: no figure holds then
	more     chan struct{} // closed and replaced at every line
}

func newLogBook() *logBook {
	return &logBook{ended: map[string]bool{}, switched: map[string]time.Time{}, more: make(chan struct{})}
}

// Write is called by the goroutine that copies the daemon's output.
func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rest = append(b.rest, p...)
	for {
		line, rest, ok := bytes.Cut(b.rest, []byte("\n"))
		if !ok {
			break
		}
		b.line(string(line))
		b.rest = bytes.Clone(rest)
	}
	close(b.more)
	b.more = make(chan struct{})
	return len(p), nil
}

// keptLines bounds what is kept for error messages.
const keptLines = 200

func (b *logBook) line(line string) {
	if len(b.lines) == keptLines {
		b.lines = b.lines[1:]
	}
	b.lines = append(b.lines, line)
	if strings.Contains(line, "pager has died") {
		b.died = line
	}
	fields := parseLog(line)
	var msg, step, id, role, at string
	for _, f := range fields {
		switch f.key {
		case "msg":
			msg = f.value
		case "time":
			at = f.value
		case "step":
			step = f.value
		case "migration":
			id = f.value
		case "role":
			role = f.value
		}
	}
	if msg == "finished" {
		b.ended[id+" "+role] = true
		return
	}
	if t, err := time.Parse(time.RFC3339Nano, at); msg == "switched" && err == nil {
		b.switched[id] = t
	}
	for _, f := range fields {
		// A bare number is no time.
		if !strings.HasSuffix(f.value, "s") {
			continue
		}
		d, err := time.ParseDuration(f.value)
		if err != nil {
			continue
		}
		name := msg + ": " + f.key
		if step != "" {
			name = msg + ": " + step
		}
		b.steps = append(b.steps, Step{name, d})
	}
}

// take returns the steps since the last call and forgets them.
func (b *logBook) take(id string) []Step {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.steps
	b.steps, b.lines = nil, nil
	for k := range b.ended {
		if strings.HasPrefix(k, id) {
			delete(b.ended, k)
		}
	}
	return s
}

// finished waits until the daemon has logged the end of a migration, and
// returns the steps.
func (b *logBook) finished(ctx context.Context, id, role string) ([]Step, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		b.mu.Lock()
		done, died, more := b.ended[id+" "+role], b.died, b.more
		b.mu.Unlock()
		if died != "" {
			return nil, errors.New(died)
		}
		if done {
			return b.take(id), nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil, fmt.Errorf("its daemon has not logged the end of migration %s: %w", id, ctx.Err())
		}
	}
}

// ranAt is when the process of a migration, which has finished, ran at its
// destination, as its source heard; zero where the log does not say.
func (b *logBook) ranAt(id string) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.switched[id]
}

// last is the last line, for error messages.
func (b *logBook) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.lines) == 0 {
		return strings.TrimSpace(string(b.rest))
	}
	return b.lines[len(b.lines)-1]
}

type logField struct{ key, value string }

// parseLog reads key=value pairs, of which values may be quoted as in Go.
func parseLog(line string) (fs []logField) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimLeft(line, " ") {
		key, rest, ok := strings.Cut(line, "=")
		if !ok {
			return fs
		}
		var value string
		if q, err := strconv.QuotedPrefix(rest); err == nil {
			value, _ = strconv.Unquote(q)
			line = rest[len(q):]
		} else {
			value, line, _ = strings.Cut(rest, " ")
		}
		fs = append(fs, logField{strings.TrimSpace(key), value})
	}
	return fs
}
