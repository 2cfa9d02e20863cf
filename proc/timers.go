package proc

import (
	"fmt"
	"strconv"
	"strings"
)

// Timer is one entry of /proc/PID/timers: what timer_create was given.
type Timer struct {
	ID     int
	Signal int
	Value  uint64 // sigev_value
	Notify string // "signal", "none" or "thread"
	Thread bool   // to one thread, SIGEV_THREAD_ID
	PID    int    // process or thread to notify, as the reader sees it
	Clock  int    // clockid_t; negative for CPU clocks
}

// ReadTimers reads /proc/PID/timers; none where the kernel lacks the file.
func ReadTimers(pid int) ([]Timer, error) {
	b, err := read(pid, "timers")
	if err != nil {
		return nil, err
	}
	return ParseTimers(b)
}

// ParseTimers parses the content of a timers file.
func ParseTimers(b []byte) ([]Timer, error) {
	var out []Timer
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		key, v, ok := strings.Cut(line, ": ")
		if !ok {
			return nil, fmt.Errorf("proc timers: cannot parse %q", line)
		}
		if key == "ID" {
			out = append(out, Timer{})
		}
		if len(out) == 0 {
			return nil, fmt.Errorf("proc timers: %q before an ID", line)
		}
		if err := out[len(out)-1].set(key, v); err != nil {
			return nil, fmt.Errorf("proc timers: cannot parse %q: %w", line, err)
		}
	}
	return out, nil
}

func (t *Timer) set(key, v string) (err error) {
	switch key {
	case "ID":
		t.ID, err = strconv.Atoi(v)
	case "signal":
		sig, value, ok := strings.Cut(v, "/")
		if !ok {
			return strconv.ErrSyntax
		}
		if t.Signal, err = strconv.Atoi(sig); err != nil {
			return err
		}
		// The kernel prints a pointer, with %px or %p: with or without 0x.
		t.Value, err = strconv.ParseUint(strings.TrimPrefix(value, "0x"), 16, 64)
	case "notify":
		how, who, ok := strings.Cut(v, "/")
		kind, id, ok2 := strings.Cut(who, ".")
		if !ok || !ok2 {
			return strconv.ErrSyntax
		}
		t.Notify, t.Thread = how, kind == "tid"
		t.PID, err = strconv.Atoi(id)
	case "ClockID":
		t.Clock, err = strconv.Atoi(v)
	}
	return err
}
