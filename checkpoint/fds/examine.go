package fds

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
)

// ErrRefused is what every *RefusedError is.
var ErrRefused = errors.New("descriptors that cannot be carried")

// RefusedError lists what of a process's descriptors cannot be carried.
type RefusedError struct {
	PID     int
	Reasons []string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("process %d has %v: %s", e.PID, ErrRefused, strings.Join(e.Reasons, "; "))
}

// Is makes errors.Is(err, ErrRefused) true.
func (e *RefusedError) Is(target error) bool { return target == ErrRefused }

// OpenFile is one open file description and what Capture would do with it.
type OpenFile struct {
	FDs     []int    `json:"fds"`
	Kind    string   `json:"kind"`
	What    string   `json:"what"`            // path, address, name
	State   string   `json:"state,omitempty"` // of a socket
	Carried bool     `json:"carried"`
	Reasons []string `json:"reasons,omitempty"` // why not
	Notes   []string `json:"notes,omitempty"`   // what will be different
	// File is the state as an image would hold it, without content.
	File image.OpenFile `json:"-"`
}

// Options say for which kind of migration to Examine.
type Options struct {
	TCPClose bool // as CaptureContext.TCPClose
	// Outside also looks through all other processes for holders of the pipes
	// and FIFOs found, which takes milliseconds.
	Outside bool
}

// Examine lists the open files of a process, which may be running, and says of
// each whether it can be carried. It applies the judgement of Capture. It reads
// /proc and short-lived duplicates of the descriptors and does not disturb the
// process. The result is in order of the lowest descriptor.
func Examine(ctx context.Context, pid int, opt Options) ([]OpenFile, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	e := &examiner{pid: pid, pidfd: pidfd, tcpClose: opt.TCPClose}
	defer e.close()
	if err := e.run(ctx); err != nil {
		return nil, err
	}
	if opt.Outside {
		e.findOutside()
	}
	out := make([]OpenFile, 0, len(e.files))
	for _, f := range e.files {
		out = append(out, OpenFile{
			FDs: f.nums, Kind: f.kind, What: f.what, State: f.state,
			Carried: len(f.reasons) == 0, Reasons: f.reasons, Notes: f.notes, File: f.open,
		})
	}
	return out, nil
}

// examiner looks at one process's descriptor table.
type examiner struct {
	pid, pidfd int
	content    bool // read what is in pipes, queues and memory
	tcpClose   bool

	// Where the lists of this run begin in those of the image.
	fileBase, pipeBase, memoryBase int

	memories    map[FileKey]int
	vmas        []image.VMA
	newMemories []image.SharedMemory
	ownMemories map[FileKey]int
	uncovered   map[int][]image.Chunk

	table []entry
	files []*file
	pipes []image.Pipe

	diag     *sys.SockDiag
	defaults map[sockKind]map[optKey]string
	mounts   []mount
	maps     []proc.Mapping
	deleted  map[FileKey]bool // content is in the image already
	carried  int64            // bytes of content in the image
}

// entry is one descriptor.
type entry struct {
	num     int
	cloexec bool
	file    int // in examiner.files
	link    string
	info    fdInfo
	st      unix.Stat_t
}

// file is one open file description.
type file struct {
	nums    []int
	link    string
	info    fdInfo
	st      unix.Stat_t
	open    image.OpenFile
	kind    string
	what    string
	state   string
	reasons []string
	notes   []string
	pipe    int // in examiner.pipes, for pipes and FIFOs
	peer    uint32
	inode   uint32 // of a socket
}

func (f *file) refuse(format string, a ...any) {
	f.reasons = append(f.reasons, fmt.Sprintf(format, a...))
}

func (f *file) note(format string, a ...any) { f.notes = append(f.notes, fmt.Sprintf(format, a...)) }

func (f *file) key() FileKey { return FileKey{f.st.Dev, f.st.Ino} }

// name is how messages call the file.
func (f *file) name() string {
	s := "descriptor " + strconv.Itoa(f.nums[0])
	if len(f.nums) > 1 {
		s = "descriptors " + strings.Trim(strings.ReplaceAll(fmt.Sprint(f.nums), " ", ","), "[]")
	}
	what := f.what
	if what == "" {
		what = f.link
	}
	if f.kind != "" && !strings.HasPrefix(what, f.kind) {
		what = f.kind + " " + what
	}
	return s + " (" + what + ")"
}

func (e *examiner) close() {
	if e.diag != nil {
		e.diag.Close()
	}
}

func (e *examiner) run(ctx context.Context) error {
	if err := e.readTable(); err != nil {
		return fmt.Errorf("read descriptors of process %d: %w", e.pid, err)
	}
	if err := e.group(); err != nil {
		return fmt.Errorf("compare descriptors of process %d: %w", e.pid, err)
	}
	for _, f := range e.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := e.describe(f); err != nil {
			if !e.content && errors.Is(err, unix.EBADF) {
				f.note("was closed while it was looked at")
				continue
			}
			return fmt.Errorf("process %d, %s: %w", e.pid, f.name(), err)
		}
	}
	if err := e.finishPipes(); err != nil {
		return err
	}
	e.finishSockets()
	return e.finishEpolls()
}

// readTable fills e.table, in ascending order.
func (e *examiner) readTable() error {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", e.pid))
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	infos, err := unix.Open(fmt.Sprintf("/proc/%d/fdinfo", e.pid), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(infos)
	buf := make([]byte, 4096)
	for _, n := range names {
		num, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		en := entry{num: num}
		fail := func(err error) error {
			if err == unix.ENOENT && !e.content {
				return nil // a running process closes what it wants
			}
			return fmt.Errorf("descriptor %d: %w", num, err)
		}
		k, err := unix.Readlinkat(int(dir.Fd()), n, buf)
		if err != nil {
			if err := fail(err); err != nil {
				return err
			}
			continue
		}
		en.link = string(buf[:k])
		if err := unix.Fstatat(int(dir.Fd()), n, &en.st, 0); err != nil {
			if err := fail(err); err != nil {
				return err
			}
			continue
		}
		text, err := readAt(infos, n)
		if err != nil {
			if err := fail(err); err != nil {
				return err
			}
			continue
		}
		if en.info, err = parseFDInfo(text); err != nil {
			return fmt.Errorf("descriptor %d: %w", num, err)
		}
		en.cloexec = en.info.Flags&unix.O_CLOEXEC != 0
		e.table = append(e.table, en)
	}
	slices.SortFunc(e.table, func(a, b entry) int { return a.num - b.num })
	return nil
}

// readAt reads a whole file below dir.
func readAt(dir int, name string) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 1024)
	for {
		if len(b) == cap(b) {
			b = slices.Grow(b, len(b))
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return b, nil
		}
		b = b[:len(b)+n]
	}
}

// group finds which descriptors share an open file. Only those of the same
// inode can; among them the kernel's own order makes equal ones neighbours.
func (e *examiner) group() error {
	byInode := make(map[FileKey][]int)
	for i := range e.table {
		k := FileKey{e.table[i].st.Dev, e.table[i].st.Ino}
		byInode[k] = append(byInode[k], i)
	}
	leader := make([]int, len(e.table)) // lowest entry of the same open file
	for i := range leader {
		leader[i] = i
	}
	for _, members := range byInode {
		if len(members) == 1 {
			continue
		}
		var failed error
		cmp := func(a, b int) int {
			c, err := sys.Kcmp(e.pid, e.pid, sys.KCMP_FILE, uint64(e.table[a].num), uint64(e.table[b].num))
			if err != nil && failed == nil && (e.content || err != unix.EBADF) {
				failed = fmt.Errorf("kcmp of descriptors %d and %d: %w", e.table[a].num, e.table[b].num, err)
			}
			if c == 0 && err == nil {
				return 0
			}
			if c == 0 {
				return a - b
			}
			return c
		}
		slices.SortStableFunc(members, cmp)
		for i := 1; i < len(members); i++ {
			if cmp(members[i-1], members[i]) == 0 {
				leader[members[i]] = leader[members[i-1]]
			}
		}
		if failed != nil {
			return failed
		}
	}
	index := make(map[int]int)
	for i := range e.table {
		en := &e.table[i]
		n, ok := index[leader[i]]
		if !ok {
			n = len(e.files)
			index[leader[i]] = n
			f := &file{link: en.link, info: en.info, st: en.st, pipe: -1}
			f.open = image.OpenFile{
				Flags: en.info.Flags &^ unix.O_CLOEXEC, Pos: en.info.Pos,
				UID: en.st.Uid, GID: en.st.Gid,
				ID: image.FileID{
					Dev: en.st.Dev, Ino: en.st.Ino, Size: en.st.Size,
					MTimeNS: en.st.Mtim.Nano(), Mode: en.st.Mode,
				},
			}
			e.files = append(e.files, f)
		}
		en.file = n
		e.files[n].nums = append(e.files[n].nums, en.num)
	}
	return nil
}

// dup takes a duplicate of the file into this process. The caller closes it.
func (e *examiner) dup(f *file) (int, error) {
	fd, err := unix.PidfdGetfd(e.pidfd, f.nums[0], 0)
	if err != nil {
		return -1, fmt.Errorf("take a duplicate (pidfd_getfd): %w", err)
	}
	return fd, nil
}
