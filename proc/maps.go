package proc

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Mapping is one line of /proc/PID/maps.
type Mapping struct {
	page.Range
	Prot    int    // PROT_*
	Shared  bool   // MAP_SHARED
	Offset  uint64 // bytes into the file
	Dev     uint64 // as makedev gives it
	Ino     uint64
	Name    string // path, "[heap]" and its like, or empty; without " (deleted)"
	Deleted bool
	Flags   []string // VmFlags, from smaps only
}

// Has reports whether VmFlags has the two-letter code.
func (m *Mapping) Has(flag string) bool {
	for _, f := range m.Flags {
		if f == flag {
			return true
		}
	}
	return false
}

// ReadMaps reads /proc/PID/maps. A process without memory, which has ended and is not
// reaped yet or is about to end, is [ErrGone]: its file is empty.
func ReadMaps(pid int) ([]Mapping, error) { return readMappings(pid, "maps") }

// ReadSmaps reads /proc/PID/smaps: the mappings with their VmFlags. It walks the
// page tables, 10 ms for each GiB of memory.
func ReadSmaps(pid int) ([]Mapping, error) { return readMappings(pid, "smaps") }

func readMappings(pid int, file string) ([]Mapping, error) {
	b, err := read(pid, file)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("pid %d: %w: it has no memory any more", pid, ErrGone)
	}
	return ParseMaps(b)
}

// ParseMaps parses the content of maps or smaps. The mappings returned ascend and
// do not overlap.
func ParseMaps(b []byte) ([]Mapping, error) {
	var out []Mapping
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		if rest, ok := bytes.CutPrefix(line, []byte("VmFlags:")); ok {
			if len(out) > 0 {
				out[len(out)-1].Flags = strings.Fields(string(rest))
			}
			continue
		}
		if isSmapsField(line) || len(line) == 0 {
			continue
		}
		m, err := parseMapping(line)
		if err != nil {
			return nil, err
		}
		out = append(replaced(out, m.Start), m)
	}
	return out, nil
}

// replaced cuts off what a mapping that starts at start takes the place of. The
// file is read piece by piece, and between two of them a process that runs may
// have changed a mapping that was listed already.
func replaced(out []Mapping, start page.Addr) []Mapping {
	for len(out) > 0 && out[len(out)-1].End > start {
		last := &out[len(out)-1]
		if last.Start < start {
			last.End = start
			break
		}
		out = out[:len(out)-1]
	}
	return out
}

// isSmapsField tells "Rss:   4 kB" from "7f00-7f01 r--p ...": a name with a
// colon before the first space.
func isSmapsField(line []byte) bool {
	i := bytes.IndexAny(line, ": -")
	return i > 0 && line[i] == ':'
}

func parseMapping(line []byte) (m Mapping, err error) {
	bad := func() (Mapping, error) { return Mapping{}, fmt.Errorf("proc maps: cannot parse %q", line) }
	s := scanner{b: line}
	start, ok1 := s.hex('-')
	end, ok2 := s.hex(' ')
	perm, ok3 := s.word()
	off, ok4 := s.hex(' ')
	major, ok5 := s.hex(':')
	minor, ok6 := s.hex(' ')
	ino, ok7 := s.dec()
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 || !ok7 || len(perm) != 4 || start >= end ||
		start%page.Size != 0 || end%page.Size != 0 {
		return bad()
	}
	m.Range = page.Range{Start: page.Addr(start), End: page.Addr(end)}
	for i, p := range [3]int{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if perm[i] != '-' {
			m.Prot |= p
		}
	}
	m.Shared = perm[3] == 's'
	m.Offset, m.Ino = off, ino
	m.Dev = unix.Mkdev(uint32(major), uint32(minor))
	m.Name = string(bytes.TrimLeft(s.b, " "))
	if strings.HasPrefix(m.Name, "/") {
		m.Name, m.Deleted = strings.CutSuffix(m.Name, " (deleted)")
	}
	// The kernel writes a newline inside a path, and nothing else, as octal.
	m.Name = strings.ReplaceAll(m.Name, `\012`, "\n")
	return m, nil
}

// read is os.ReadFile of a file under /proc/PID with ErrGone for what has ended.
func read(pid int, name string) ([]byte, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	return b, Gone(pid, err)
}
