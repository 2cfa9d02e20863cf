package inspect

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/proc"
)

// size is what smaps says of one mapping, in bytes.
type size struct{ rss, anonymous, swap uint64 }

// readSizes reads smaps once where it can: that walks the page tables. A program
// that runs may change a mapping between two pieces of the file; then what was
// read of it is no picture of any moment, and it is read again.
func readSizes(pid int) ([]proc.Mapping, []size, error) {
	const tries = 20
	for try := 1; ; try++ {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			return nil, nil, proc.Gone(pid, err)
		}
		maps, err := proc.ParseMaps(b)
		if err != nil {
			return nil, nil, err
		}
		sizes := parseSizes(b)
		if len(sizes) == len(maps) {
			return maps, sizes, nil
		}
		if try == tries {
			return nil, nil, fmt.Errorf("its mappings change faster than they can be listed: %d of them, %d sizes", len(maps), len(sizes))
		}
	}
}

func (r *Report) mappings() error {
	maps, sizes, err := readSizes(r.PID)
	if err != nil {
		return err
	}
	kinds := make(map[string]int)
	for i := range maps {
		m := &maps[i]
		kind, reason := Judge(m)
		if reason == "" && strings.HasPrefix(kind, "file") && !sameFile(r.PID, m) {
			reason = "its file was replaced by another one of that name, or cannot be reached from here"
		}
		s := sizes[i]
		own := s.anonymous + s.swap
		if kind == KindSharedAnonymous || kind == KindMemfd {
			own = s.rss + s.swap
		}
		if kind == KindKernel {
			own = 0
		}
		mm := Mapping{
			Start: uint64(m.Start), End: uint64(m.End), Prot: protString(m), Kind: kind, Path: m.Name,
			ResidentBytes: s.rss, SwappedBytes: s.swap, OwnBytes: own, Carried: reason == "", Reason: reason,
		}
		r.Mappings = append(r.Mappings, mm)
		r.MemoryBytes += own
		k, ok := kinds[kind]
		if !ok {
			k = len(r.Memory.Kinds)
			kinds[kind] = k
			r.Memory.Kinds = append(r.Memory.Kinds, MemoryKind{Kind: kind})
		}
		sum := &r.Memory.Kinds[k]
		sum.Mappings++
		sum.TotalBytes += m.Bytes()
		sum.ResidentBytes += s.rss
		sum.SwappedBytes += s.swap
		r.Memory.TotalBytes += m.Bytes()
		r.Memory.ResidentBytes += s.rss
		r.Memory.SwappedBytes += s.swap
		if reason != "" {
			r.refuse("mapping", fmt.Sprintf("%v %s", m.Range, m.Name), "%s", reason)
		}
		if strings.HasPrefix(kind, "file") && reason == "" {
			if kind == KindFile {
				r.MappedFiles = append(r.MappedFiles, fileid.Original(m.Name))
			} else {
				r.Files = append(r.Files, m.Name)
			}
		}
	}
	for _, k := range r.Memory.Kinds {
		r.carry("memory", "%s: %d mappings", k.Kind, k.Mappings)
	}
	return nil
}

// Kinds of mappings.
const (
	KindAnonymous       = "anonymous"
	KindHeap            = "heap"
	KindStack           = "stack"
	KindSharedAnonymous = "shared anonymous"
	KindMemfd           = "memfd"
	KindFile            = "file"
	KindFileShared      = "file, shared"
	KindDevZero         = "/dev/zero"
	KindKernel          = "kernel" // vdso, vvar, vsyscall
	KindSysV            = "system V shared memory"
	KindHuge            = "huge pages"
	KindDevice          = "device"
	KindOther           = "other"
)

// Judge says what kind of mapping m is and, where it cannot be carried, why. m
// is from smaps, with its flags.
func Judge(m *proc.Mapping) (kind, reason string) {
	name := m.Name
	switch {
	case name == "[vdso]", name == "[vvar]", name == "[vvar_vclock]", name == "[vsyscall]":
		return KindKernel, ""
	case m.Has("ht"), name == "/anon_hugepage":
		return KindHuge, "huge pages of hugetlbfs cannot be carried"
	case m.Has("ss"):
		return KindOther, "a shadow stack cannot be carried"
	case strings.HasPrefix(name, "/SYSV") && m.Deleted:
		return KindSysV, "System V shared memory cannot be carried"
	case name == "/[aio]" || name == "[aio]":
		return KindOther, "asynchronous input and output (io_setup) cannot be carried"
	case name == "[uprobes]":
		return KindOther, "is probed by a tracing program (uprobes); end that first"
	case name == "/secretmem":
		return KindOther, "secret memory cannot be read"
	case strings.HasPrefix(name, "anon_inode:"), strings.HasPrefix(name, "socket:"):
		return KindOther, "memory of " + strings.TrimPrefix(name, "anon_inode:") + " is shared with the kernel"
	}
	kind, reason = judgeKind(m)
	switch {
	case reason != "":
	case m.Has("pf"), m.Has("io") && kind != KindKernel:
		return KindDevice, "memory of a device"
	case m.Has("um"), m.Has("uw"), m.Has("ui"):
		reason = "its page faults are handled by a userfaultfd: the program does, or another migration is under way"
	}
	return kind, reason
}

func judgeKind(m *proc.Mapping) (kind, reason string) {
	name := m.Name
	switch {
	case strings.HasPrefix(name, "/memfd:") && m.Deleted:
		return KindMemfd, ""
	case name == "/dev/zero" && m.Deleted:
		// What the kernel calls MAP_SHARED|MAP_ANONYMOUS.
		return KindSharedAnonymous, ""
	case strings.HasPrefix(name, "[anon_shmem:"):
		return KindSharedAnonymous, ""
	case name == "/dev/zero":
		return KindDevZero, ""
	case strings.HasPrefix(name, "/dev/") && !strings.HasPrefix(name, "/dev/shm/"):
		return KindDevice, "memory of the device " + name
	case strings.HasPrefix(name, "/"):
		kind = KindFile
		if m.Shared {
			kind = KindFileShared
		}
		if m.Deleted {
			reason = "its file was deleted (an upgrade?): restart the program first"
		}
		return kind, reason
	case name == "[heap]":
		return KindHeap, ""
	case strings.HasPrefix(name, "[stack"):
		return KindStack, ""
	case name == "", strings.HasPrefix(name, "[anon:"):
		if m.Shared {
			return KindOther, "is shared in a way that is not known here"
		}
		return KindAnonymous, ""
	}
	return KindOther, "is of a kind that is not known here"
}

// sameFile reports whether the path of a file mapping still names its file.
func sameFile(pid int, m *proc.Mapping) bool {
	var a, b unix.Stat_t
	if unix.Stat(m.Name, &a) != nil {
		return false
	}
	if a.Ino == m.Ino && a.Dev == m.Dev {
		return true
	}
	// Some file systems show another device in maps than in stat.
	link := fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, uint64(m.Start), uint64(m.End))
	return unix.Stat(link, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

func protString(m *proc.Mapping) string {
	b := []byte("---p")
	for i, p := range []int{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if m.Prot&p != 0 {
			b[i] = "rwx"[i]
		}
	}
	if m.Shared {
		b[3] = 's'
	}
	return string(b)
}

// parseSizes reads the sizes of smaps, one for each mapping in order.
func parseSizes(b []byte) []size {
	var out []size
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte{'\n'})
		b = rest
		colon := bytes.IndexByte(line, ':')
		space := bytes.IndexByte(line, ' ')
		if colon < 0 || space >= 0 && space < colon {
			// "start-end prot ...": a new mapping. Fields begin with a word.
			if bytes.IndexByte(line, '-') > 0 {
				out = append(out, size{})
			}
			continue
		}
		if len(out) == 0 {
			continue
		}
		v, ok := strings.CutSuffix(string(bytes.TrimSpace(line[colon+1:])), " kB")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(v, 10, 54)
		if err != nil {
			continue
		}
		s := &out[len(out)-1]
		switch string(line[:colon]) {
		case "Rss":
			s.rss = n << 10
		case "Anonymous":
			s.anonymous = n << 10
		case "Swap":
			s.swap = n << 10
		}
	}
	return out
}
