package restore

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// clocks are CLOCK_MONOTONIC and CLOCK_BOOTTIME of somebody at some moment, or
// offsets between those of two.
type clocks struct{ mono, boot time.Duration }

func (c clocks) add(o clocks) clocks { return clocks{c.mono + o.mono, c.boot + o.boot} }
func (c clocks) sub(o clocks) clocks { return clocks{c.mono - o.mono, c.boot - o.boot} }

// maxJump is how far a clock may be ahead of the image's when the process is
// rebuilt: the time that has passed since the freeze, and no more.
const maxJump = 5 * time.Second

// continues reports whether a process whose clocks show c goes on from where
// the image's stood: not behind, and not far ahead.
func (c clocks) continues(from clocks) bool {
	ok := func(d time.Duration) bool { return d >= 0 && d <= maxJump }
	d := c.sub(from)
	return ok(d.mono) && ok(d.boot)
}

// hostClocks reads the clocks of the initial time namespace, against which
// offsets count, whatever namespace we are in.
func hostClocks() (clocks, error) {
	var c, own clocks
	for id, d := range map[int32]*time.Duration{unix.CLOCK_MONOTONIC: &c.mono, unix.CLOCK_BOOTTIME: &c.boot} {
		var ts unix.Timespec
		if err := unix.ClockGettime(id, &ts); err != nil {
			return c, fmt.Errorf("clock_gettime: %w", err)
		}
		*d = time.Duration(ts.Nano())
	}
	b, err := os.ReadFile("/proc/self/timens_offsets")
	if errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("time namespaces: this kernel has none (needs Linux 5.6 or later with CONFIG_TIME_NS): %w", err)
	} else if err != nil {
		return c, err
	}
	if own, err = parseOffsets(string(b)); err != nil {
		return c, err
	}
	return c.sub(own), nil
}

// parseOffsets reads /proc/PID/timens_offsets: lines of clock, seconds and
// nanoseconds.
func parseOffsets(s string) (clocks, error) {
	var c clocks
	for line := range strings.Lines(s) {
		var name string
		var sec, nsec int64
		if _, err := fmt.Sscan(line, &name, &sec, &nsec); err != nil {
			return c, fmt.Errorf("timens_offsets: line %q: %w", line, err)
		}
		d := time.Duration(sec)*time.Second + time.Duration(nsec)
		switch name {
		case "monotonic":
			c.mono = d
		case "boottime":
			c.boot = d
		}
	}
	return c, nil
}

// String is c as /proc/PID/timens_offsets takes it.
func (c clocks) String() string {
	line := func(name string, d time.Duration) string {
		sec, nsec := d/time.Second, d%time.Second
		if nsec < 0 {
			sec, nsec = sec-1, nsec+time.Second
		}
		return fmt.Sprintf("%s %d %d\n", name, sec, nsec)
	}
	return line("monotonic", c.mono) + line("boottime", c.boot)
}

// setOffsets sets the offsets of the time namespace that the next child of pid
// will live in. It can be done until that child exists.
func setOffsets(pid int, c clocks) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/timens_offsets", pid), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(c.String())
	return errors.Join(err, f.Close())
}
