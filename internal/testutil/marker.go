package testutil

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A marker names one test process; the environment of whatever it starts
// carries it, followed by those of test processes started in between.
const (
	envMarker = "PAGEFERRY_TEST"
	envGuard  = "PAGEFERRY_TEST_GUARD"
	envTemp   = "PAGEFERRY_TEST_TEMP"
)

var (
	// realTemp is the temporary directory before Main gave us one of our own.
	realTemp = cmp.Or(os.Getenv(envTemp), os.TempDir())
	ownTemp  string
	marker   string
	// born is when this process started, in clock ticks since boot.
	born uint64
)

func init() {
	if m := os.Getenv(envGuard); m != "" {
		guard(m)
	}
	st, err := readStat(os.Getpid())
	if err != nil {
		return // not Linux's /proc; NoLeaks will say so
	}
	born = st.start
	marker = fmt.Sprintf("pf%d.%d", os.Getpid(), born)
	all := marker
	if up := os.Getenv(envMarker); up != "" {
		all = up + "," + marker
	}
	os.Setenv(envMarker, all)
}

// stat is what we need of /proc/PID/stat.
type stat struct {
	pid, ppid int
	comm      string
	state     byte
	start     uint64
}

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, err
	}
	// comm may hold spaces and parentheses: the last ')' ends it.
	i, j := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if i < 0 || j < i {
		return stat{}, fmt.Errorf("pid %d: strange stat line", pid)
	}
	f := strings.Fields(string(b[j+1:]))
	if len(f) < 20 {
		return stat{}, fmt.Errorf("pid %d: short stat line", pid)
	}
	s := stat{pid: pid, comm: string(b[i+1 : j]), state: f[0][0]}
	s.ppid, _ = strconv.Atoi(f[1])
	s.start, _ = strconv.ParseUint(f[19], 10, 64)
	return s, nil
}

// processes lists the host's processes.
func processes() map[int]stat {
	m := map[int]stat{}
	dirs, _ := os.ReadDir("/proc")
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(pid); err == nil {
			m[pid] = s
		}
	}
	return m
}

// family lists the processes that came from the test process with marker m,
// which is (or was) pid self: its descendants, and whoever carries the marker
// in its environment. Guards are left out.
func family(m string, self int, since uint64) map[int]stat {
	all := processes()
	fam := map[int]stat{}
	for pid, s := range all {
		if pid == self || pid == os.Getpid() || s.start < since {
			continue
		}
		env, answered := environ(pid)
		switch {
		case hasVar(env, envGuard, nil):
			continue
		case descends(all, s, self), hasMarker(env, m):
			fam[pid] = s
		case !answered, len(env) > 0 && len(bytes.Trim(env, "\x00")) == 0:
			// Its environment never arrived. Whose it is can only be told by those
			// it descends from, or where nobody else tests at the same time.
			if os.Getenv(envRequireAll) == "1" && !ofAnother(all, s, m) {
				fam[pid] = s
			}
		}
	}
	return fam
}

func descends(all map[int]stat, s stat, anc int) bool {
	for range 1000 {
		if s.ppid == anc {
			return true
		}
		up, ok := all[s.ppid]
		if !ok || s.ppid <= 1 {
			return false
		}
		s = up
	}
	return false
}

// ofAnother reports whether a process descends from one that carries another marker
// than m: an init of a lab's host, say.
func ofAnother(all map[int]stat, s stat, m string) bool {
	for range 1000 {
		up, ok := all[s.ppid]
		if !ok || s.ppid <= 1 {
			return false
		}
		if env, answered := environ(up.pid); answered && hasVar(env, envMarker, nil) {
			return !hasMarker(env, m)
		}
		s = up
	}
	return false
}

// environ reads a process's environment. That blocks where the memory is still
// to arrive, so it is done aside; answered is false if it did not come back.
func environ(pid int) (env []byte, answered bool) {
	c := make(chan []byte, 1)
	go func() {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
		c <- b
	}()
	select {
	case b := <-c:
		return b, true
	case <-time.After(2 * time.Second):
		return nil, false
	}
}

func hasMarker(env []byte, m string) bool {
	return hasVar(env, envMarker, func(v string) bool {
		for part := range strings.SplitSeq(v, ",") {
			if part == m {
				return true
			}
		}
		return false
	})
}

func hasVar(env []byte, name string, ok func(string) bool) bool {
	for v := range bytes.SplitSeq(env, []byte{0}) {
		if s, found := strings.CutPrefix(string(v), name+"="); found && (ok == nil || ok(s)) {
			return true
		}
	}
	return false
}

var guardOnce sync.Once

// startGuard starts the process that ends whatever we leave behind if we are
// killed or panic: it waits for the end of file of a pipe that only we hold.
func startGuard() {
	guardOnce.Do(func() {
		r, w, err := os.Pipe()
		if err != nil {
			return
		}
		exe, err := os.Executable()
		if err != nil {
			return
		}
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), envGuard+"="+marker)
		cmd.Stdin = r
		cmd.Stderr = os.Stderr
		// A session of its own: Ctrl-C and kill of the group are for the tests.
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			fmt.Fprintf(os.Stderr, "testutil: no guard process: %v\n", err)
		}
		r.Close()
		guardPipe = w
	})
}

// guardPipe must stay referenced: a finalizer would close it.
var guardPipe *os.File

// guard is the body of the guard process. It does not return.
func guard(m string) {
	_, _ = io.Copy(io.Discard, os.Stdin)
	var self int
	var since uint64
	if _, err := fmt.Sscanf(m, "pf%d.%d", &self, &since); err != nil {
		os.Exit(2)
	}
	for range 50 {
		fam := family(m, self, since)
		live := 0
		for pid, s := range fam {
			env, answered := environ(pid)
			if s.state == 'Z' || !answered || !hasMarker(env, m) {
				continue
			}
			live++
			kill(pid, s.start)
		}
		if live == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	removeMarked(m)
	os.Exit(0)
}

// removeMarked removes the temporary directory of a test process that is gone.
func removeMarked(m string) {
	dirs, _ := filepath.Glob(filepath.Join(realTemp, "pft*", ".marker"))
	for _, f := range dirs {
		if b, err := os.ReadFile(f); err == nil && string(b) == m {
			_ = os.RemoveAll(filepath.Dir(f))
		}
	}
}

// kill ends one process, and no other that got its number meanwhile.
func kill(pid int, start uint64) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if s, err := readStat(pid); err != nil || s.start != start {
		return
	}
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
}
