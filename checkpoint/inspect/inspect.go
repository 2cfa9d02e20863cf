package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/proc"
)

var (
	ErrNoProcess    = errors.New("there is no such process")
	ErrThread       = errors.New("this is a thread; give the process id")
	ErrKernelThread = errors.New("this is a kernel thread")
	ErrZombie       = errors.New("the process has ended and waits for its parent")
)

// Inspect looks at a process. An error means that there is nothing to report
// on; what makes the process immovable is in the report.
func Inspect(pid int, opt Options) (*Report, error) {
	return InspectContext(context.Background(), pid, opt)
}

// InspectContext is Inspect with a time limit.
func InspectContext(ctx context.Context, pid int, opt Options) (*Report, error) {
	r := &Report{PID: pid}
	if err := r.inspect(ctx, opt); err != nil {
		if errors.Is(err, proc.ErrGone) || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			err = fmt.Errorf("%w: %w", ErrNoProcess, err)
		}
		return nil, fmt.Errorf("inspect process %d: %w", pid, err)
	}
	return r, nil
}

func (r *Report) inspect(ctx context.Context, opt Options) error {
	if r.PID <= 0 {
		return ErrNoProcess
	}
	st, err := proc.ReadStat(r.PID)
	if err != nil {
		return err
	}
	status, err := proc.ReadStatus(r.PID)
	if err != nil {
		return err
	}
	switch {
	case status.TGID != r.PID:
		return ErrThread
	case st.KernelThread():
		return ErrKernelThread
	}
	if st.State == 'Z' || st.State == 'X' {
		if status.Threads <= 1 {
			return ErrZombie
		}
		r.refuse("thread", strconv.Itoa(r.PID), "the main thread has ended while others run on")
		r.finish()
		return nil
	}
	r.Comm, r.State = st.Comm, stateName(st.State)
	r.InnerPID = r.PID
	if n := len(status.NSPID); n > 0 {
		r.InnerPID = status.NSPID[n-1]
	}
	if r.PID == os.Getpid() {
		r.refuse("process", strconv.Itoa(r.PID), "this is pageferry itself")
	}
	if r.PID == 1 {
		r.refuse("process", "1", "is the init of this host")
		r.finish()
		return nil
	}
	r.credentials(status)
	if err := r.threads(status); err != nil {
		return err
	}
	r.family(st, status)
	r.namespaces()
	r.confinement(status)
	if err := r.places(); err != nil {
		return err
	}
	if err := r.mappings(); err != nil {
		return err
	}
	if err := r.timers(); err != nil {
		return err
	}
	if err := r.descriptors(ctx, opt); err != nil {
		return err
	}
	r.unit(ctx)
	r.finish()
	return nil
}

func stateName(c byte) string {
	switch c {
	case 'R':
		return "running"
	case 'S':
		return "sleeping"
	case 'D':
		return "disk sleep"
	case 'T':
		return "stopped"
	case 't':
		return "traced"
	case 'Z':
		return "zombie"
	case 'X':
		return "dead"
	case 'I':
		return "idle"
	}
	return string(rune(c))
}

func (r *Report) credentials(s *proc.Status) {
	r.UID, r.GID = s.UID[1], s.GID[1]
	r.Capabilities, r.NoNewPrivs = s.CapEff, s.NoNewPrivs
	r.carry("credentials", "uid %d gid %d, %d further groups, capabilities %#x", s.UID[1], s.GID[1], len(s.Groups), s.CapEff)
}

func (r *Report) threads(main *proc.Status) error {
	tids, err := proc.Threads(r.PID)
	if err != nil {
		return err
	}
	slices.Sort(tids)
	for _, tid := range tids {
		s, err := proc.ReadThreadStatus(r.PID, tid)
		if errors.Is(err, proc.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		r.Threads = append(r.Threads, Thread{TID: tid, Comm: s.Name, State: stateName(s.State)})
		what := fmt.Sprintf("%d (%s)", tid, s.Name)
		switch {
		case s.TracerPID != 0:
			who, _ := proc.Comm(s.TracerPID, s.TracerPID)
			r.refuse("thread", what, "is traced by process %d (%s), a debugger or another migration; end that first", s.TracerPID, who)
		case s.UID != main.UID || s.GID != main.GID || !slices.Equal(s.Groups, main.Groups) ||
			s.CapEff != main.CapEff || s.CapPrm != main.CapPrm || s.CapInh != main.CapInh ||
			s.CapBnd != main.CapBnd || s.CapAmb != main.CapAmb || s.NoNewPrivs != main.NoNewPrivs:
			r.refuse("thread", what, "has other credentials than the main thread")
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", r.PID, tid)); err == nil {
			if f := field(string(b), "x86_Thread_features:"); strings.Contains(f, "shstk") {
				r.refuse("thread", what, "uses a shadow stack")
			}
		}
	}
	r.carry("threads", "%d", len(r.Threads))
	return nil
}

// field finds a line of a status file.
func field(s, key string) string {
	for line := range strings.Lines(s) {
		if v, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func (r *Report) family(st *proc.Stat, s *proc.Status) {
	r.ParentPID = st.PPID
	if st.PPID > 0 {
		r.ParentComm, _ = proc.Comm(st.PPID, st.PPID)
		r.carry("parent", "%d (%s)", st.PPID, r.ParentComm).Note = "sees it end here; there it is adopted"
	}
	var children []string
	for _, t := range r.Threads {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", r.PID, t.TID))
		if err != nil {
			continue
		}
		children = append(children, strings.Fields(string(b))...)
	}
	for _, c := range children {
		pid, _ := strconv.Atoi(c)
		comm, _ := proc.Comm(pid, pid)
		r.refuse("child", fmt.Sprintf("%s (%s)", c, comm), "a process with children: trees of processes cannot move yet")
	}
	if n := len(s.NSPID); n > 1 && s.NSPID[n-1] == 1 {
		r.refuse("process", strconv.Itoa(r.PID), "is the init of a pid namespace")
	}
}

// places are the directories and the program of a process.
func (r *Report) places() error {
	var err error
	if r.Exe, err = proc.Link(r.PID, "exe"); err != nil {
		return err
	}
	if r.Cwd, err = proc.Link(r.PID, "cwd"); err != nil {
		return err
	}
	root, err := proc.Link(r.PID, "root")
	if err != nil {
		return err
	}
	if root != "/" {
		r.refuse("root", root, "is another root directory than ours (chroot)")
	}
	isLink := same(r.Exe, fmt.Sprintf("/proc/%d/exe", r.PID))
	exe, _, memory := fileid.ExeName(r.Exe)
	switch {
	case isLink:
		r.carry("executable", "%s", r.Exe)
		r.MappedFiles = append(r.MappedFiles, r.Exe)
	case memory:
		r.Exe = exe
		r.carry("executable", "%s, in memory since it moved here", r.Exe)
		r.MappedFiles = append(r.MappedFiles, r.Exe)
	default:
		r.Exe = exe
		r.refuse("executable", r.Exe, "was deleted or replaced since it was started (an upgrade?): restart the program first")
	}
	if same(r.Cwd, fmt.Sprintf("/proc/%d/cwd", r.PID)) {
		r.carry("working directory", "%s", r.Cwd)
		r.Directories = append(r.Directories, r.Cwd)
	} else {
		r.refuse("working directory", r.Cwd, "was deleted or cannot be reached from here")
	}
	if class, err := elfClass(fmt.Sprintf("/proc/%d/exe", r.PID)); err == nil && class != 2 {
		r.refuse("executable", r.Exe, "is a 32-bit program")
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/personality", r.PID)); err == nil {
		if v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 16, 32); err == nil && v != 0 {
			if v&0xff != 0 {
				r.refuse("personality", fmt.Sprintf("%#x", v), "is of another system than Linux")
			} else {
				r.carry("personality", "%#x", v)
			}
		}
	}
	return nil
}

// same reports whether path names what the link of the kernel leads to.
func same(path, link string) bool {
	var a, b unix.Stat_t
	return filepath.IsAbs(path) && unix.Stat(path, &a) == nil && unix.Stat(link, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// elfClass is 1 for 32 bits and 2 for 64.
func elfClass(path string) (byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var b [5]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return 0, err
	}
	if string(b[:4]) != "\x7fELF" {
		return 0, errors.New("not an ELF file")
	}
	return b[4], nil
}

func (r *Report) timers() error {
	ts, err := proc.ReadTimers(r.PID)
	if err != nil {
		return err
	}
	for _, t := range ts {
		r.carry("timer", "%d of clock %d, by %s", t.ID, t.Clock, t.Notify)
	}
	return nil
}

func (r *Report) descriptors(ctx context.Context, opt Options) error {
	var err error
	r.Descriptors, err = fds.Examine(ctx, r.PID, fds.Options{TCPClose: opt.TCPClose, Outside: true})
	if err != nil {
		return err
	}
	for i := range r.Descriptors {
		d := &r.Descriptors[i]
		nums := strings.Trim(strings.ReplaceAll(fmt.Sprint(d.FDs), " ", ","), "[]")
		what := strings.TrimSpace(nums + " " + d.Kind + " " + strings.TrimPrefix(d.What, d.Kind+" "))
		if d.State != "" {
			what += " (" + d.State + ")"
		}
		it := Item{Kind: "descriptor", What: what, Carried: d.Carried,
			Reason: strings.Join(d.Reasons, "; "), Note: strings.Join(d.Notes, "; ")}
		r.Items = append(r.Items, it)
		for _, l := range d.File.Locks {
			r.carry("lock", "%s of descriptor %d, %s from %d", l.Kind, d.FDs[0], map[bool]string{true: "write", false: "read"}[l.Write], l.Start).Note =
				"is taken again there; it must be free there"
		}
		r.needs(d)
	}
	for _, l := range fds.Listeners(r.Descriptors) {
		if l.Network != "unix" {
			r.Listeners = append(r.Listeners, l.String())
		}
	}
	return nil
}

// needs collects what of a descriptor must exist at the destination.
func (r *Report) needs(d *fds.OpenFile) {
	f := &d.File
	if !d.Carried || f.Path == "" || strings.HasPrefix(f.Path, "/proc/") {
		return
	}
	switch f.Kind {
	case image.FileRegular:
		if f.Deleted {
			r.Directories = append(r.Directories, filepath.Dir(f.Path))
		} else {
			r.Files = append(r.Files, f.Path)
		}
	case image.FileDirectory:
		r.Directories = append(r.Directories, f.Path)
	case image.FileFIFO, image.FileSocket:
		r.Directories = append(r.Directories, filepath.Dir(f.Path))
	case image.FileInotify:
	}
}

// finish puts lists in order and draws the conclusion.
func (r *Report) finish() {
	for i := range r.Descriptors {
		for _, w := range r.Descriptors[i].File.Inotify {
			if st, err := os.Lstat(w.Path); err == nil && st.IsDir() {
				r.Directories = append(r.Directories, w.Path)
			} else {
				r.Files = append(r.Files, w.Path)
			}
		}
	}
	for _, l := range []*[]string{&r.Files, &r.MappedFiles, &r.Directories, &r.Listeners} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
		if *l == nil {
			*l = []string{} // [] and not null in JSON
		}
	}
	r.MappedFiles = slices.DeleteFunc(r.MappedFiles, func(f string) bool {
		_, both := slices.BinarySearch(r.Files, f)
		return both
	})
	r.Movable = true
	for _, it := range r.Items {
		r.Movable = r.Movable && it.Carried
	}
}
