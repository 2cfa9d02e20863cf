package proc

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Status is what is used of /proc/PID/status. Signal sets are kernel words: bit
// n-1 is signal n.
type Status struct {
	Name      string
	Umask     uint32
	State     byte // R S D T t Z X I
	TGID      int
	PPID      int
	TracerPID int
	UID, GID  [4]uint32 // real, effective, saved, fs
	Groups    []uint32
	NSTGID    []int // outermost first
	NSPID     []int
	NSPGID    []int
	NSSID     []int
	Kthread   bool // 6.8 and later say so
	VMSizeKiB uint64
	RSSKiB    uint64
	Threads   int

	SigPending, SharedPending, SigBlocked, SigIgnored, SigCaught uint64

	CapInh, CapPrm, CapEff, CapBnd, CapAmb uint64
	NoNewPrivs                             bool
	Seccomp                                int // 0 off, 1 strict, 2 filter
	HasMM                                  bool
	THPEnabled                             bool
}

// ReadStatus reads /proc/PID/status; for a thread give its tid.
func ReadStatus(pid int) (*Status, error) {
	b, err := read(pid, "status")
	if err != nil {
		return nil, err
	}
	return ParseStatus(b)
}

// ReadThreadStatus reads the status of one thread of a process.
func ReadThreadStatus(pid, tid int) (*Status, error) {
	b, err := read(pid, "task/"+strconv.Itoa(tid)+"/status")
	if err != nil {
		return nil, err
	}
	return ParseStatus(b)
}

// ParseStatus parses the content of a status file. Unknown lines are passed over.
func ParseStatus(b []byte) (*Status, error) {
	s := &Status{THPEnabled: true}
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		i := bytes.IndexByte(line, ':')
		if i < 0 {
			continue
		}
		if err := s.set(string(line[:i]), strings.TrimLeft(string(line[i+1:]), " \t")); err != nil {
			return nil, fmt.Errorf("proc status: line %q: %w", line, err)
		}
	}
	return s, nil
}

func (s *Status) set(key, v string) (err error) {
	switch key {
	case "Name":
		s.Name = unescape(v)
	case "Umask":
		err = parse(v, 8, &s.Umask)
	case "State":
		if v != "" {
			s.State = v[0]
		}
	case "Tgid":
		err = parse(v, 10, &s.TGID)
	case "PPid":
		err = parse(v, 10, &s.PPID)
	case "TracerPid":
		err = parse(v, 10, &s.TracerPID)
	case "Uid":
		err = four(v, &s.UID)
	case "Gid":
		err = four(v, &s.GID)
	case "Groups":
		s.Groups, err = list[uint32](v)
	case "NStgid":
		s.NSTGID, err = list[int](v)
	case "NSpid":
		s.NSPID, err = list[int](v)
	case "NSpgid":
		s.NSPGID, err = list[int](v)
	case "NSsid":
		s.NSSID, err = list[int](v)
	case "Kthread":
		s.Kthread = v == "1"
	case "VmSize":
		s.HasMM = true
		err = parse(strings.TrimSuffix(v, " kB"), 10, &s.VMSizeKiB)
	case "VmRSS":
		err = parse(strings.TrimSuffix(v, " kB"), 10, &s.RSSKiB)
	case "Threads":
		err = parse(v, 10, &s.Threads)
	case "SigPnd":
		err = parse(v, 16, &s.SigPending)
	case "ShdPnd":
		err = parse(v, 16, &s.SharedPending)
	case "SigBlk":
		err = parse(v, 16, &s.SigBlocked)
	case "SigIgn":
		err = parse(v, 16, &s.SigIgnored)
	case "SigCgt":
		err = parse(v, 16, &s.SigCaught)
	case "CapInh":
		err = parse(v, 16, &s.CapInh)
	case "CapPrm":
		err = parse(v, 16, &s.CapPrm)
	case "CapEff":
		err = parse(v, 16, &s.CapEff)
	case "CapBnd":
		err = parse(v, 16, &s.CapBnd)
	case "CapAmb":
		err = parse(v, 16, &s.CapAmb)
	case "NoNewPrivs":
		s.NoNewPrivs = v == "1"
	case "Seccomp":
		err = parse(v, 10, &s.Seccomp)
	case "THP_enabled":
		s.THPEnabled = v != "0"
	}
	return err
}

func parse[T ~int | ~uint32 | ~uint64](v string, base int, to *T) error {
	n, err := strconv.ParseUint(strings.TrimSpace(v), base, 64)
	if err != nil {
		return err
	}
	if *to = T(n); uint64(*to) != n {
		return strconv.ErrRange
	}
	return nil
}

func list[T ~int | ~uint32](v string) ([]T, error) {
	var out []T
	for f := range strings.FieldsSeq(v) {
		var x T
		if err := parse(f, 10, &x); err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

func four(v string, to *[4]uint32) error {
	l, err := list[uint32](v)
	if err == nil && len(l) != 4 {
		err = fmt.Errorf("%d ids instead of 4", len(l))
	}
	if err == nil {
		copy(to[:], l)
	}
	return err
}

// unescape undoes what the kernel does to a comm: backslash and newline.
func unescape(s string) string {
	return strings.NewReplacer(`\\`, `\`, `\n`, "\n").Replace(s)
}
