package proc

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Stat is what is used of /proc/PID/stat. Addresses are 0 for whoever may not
// ptrace the process.
type Stat struct {
	PID                                int
	Comm                               string
	State                              byte
	PPID                               int
	PGID                               int
	SID                                int
	Flags                              uint64 // PF_*
	StartTime                          uint64 // clock ticks after boot
	StartCode, EndCode, StartStack     uint64
	StartData, EndData, StartBrk       uint64
	ArgStart, ArgEnd, EnvStart, EnvEnd uint64
}

// KernelThread reports whether the process has no user space (PF_KTHREAD).
func (s *Stat) KernelThread() bool { return s.Flags&0x00200000 != 0 }

// ReadStat reads /proc/PID/stat.
func ReadStat(pid int) (*Stat, error) {
	b, err := read(pid, "stat")
	if err != nil {
		return nil, err
	}
	return ParseStat(b)
}

// ParseStat parses the content of a stat file. The comm may hold spaces and
// parentheses, so the fields are counted from the last one.
func ParseStat(b []byte) (*Stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return nil, fmt.Errorf("proc stat: no comm in %q", b)
	}
	s := &Stat{Comm: string(b[open+1 : end])}
	var err error
	if s.PID, err = strconv.Atoi(strings.TrimSpace(string(b[:open]))); err != nil {
		return nil, fmt.Errorf("proc stat: %w", err)
	}
	f := strings.Fields(string(b[end+1:]))
	const first = 3 // number of f[0] in proc(5)
	if len(f) < 52-first || len(f[0]) != 1 {
		return nil, fmt.Errorf("proc stat: %d fields", len(f))
	}
	s.State = f[0][0]
	for _, x := range []struct {
		n  int
		to *int
	}{{4, &s.PPID}, {5, &s.PGID}, {6, &s.SID}} {
		if *x.to, err = strconv.Atoi(f[x.n-first]); err != nil {
			return nil, fmt.Errorf("proc stat: field %d: %w", x.n, err)
		}
	}
	for _, x := range []struct {
		n  int
		to *uint64
	}{
		{9, &s.Flags}, {22, &s.StartTime}, {26, &s.StartCode}, {27, &s.EndCode}, {28, &s.StartStack},
		{45, &s.StartData}, {46, &s.EndData}, {47, &s.StartBrk},
		{48, &s.ArgStart}, {49, &s.ArgEnd}, {50, &s.EnvStart}, {51, &s.EnvEnd},
	} {
		if *x.to, err = strconv.ParseUint(f[x.n-first], 10, 64); err != nil {
			return nil, fmt.Errorf("proc stat: field %d: %w", x.n, err)
		}
	}
	return s, nil
}
