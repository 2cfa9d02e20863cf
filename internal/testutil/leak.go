package testutil

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// leakPatience is how long what a test started may take to go away.
const leakPatience = 10 * time.Second

// NoLeaks fails the test if, at its end and after all its other cleanups, there
// is something that was not there when NoLeaks was called: processes that came
// from this test process (also where they were adopted by somebody else),
// mounts, named network namespaces and cgroups of pageferry's, descriptors and
// goroutines of the test process, temporary files. Call it first, and not in
// parallel tests.
func NoLeaks(t testing.TB) {
	t.Helper()
	startGuard()
	warmUp()
	before := takeSnapshot()
	t.Cleanup(func() {
		var leaks []string
		deadline := time.Now().Add(leakPatience)
		for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
			if leaks = takeSnapshot().minus(before); len(leaks) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(wait)
		}
		for _, l := range leaks {
			t.Errorf("left behind: %s", l)
		}
	})
}

// warmUp makes the runtime open what it opens once: the poller's descriptors.
func warmUp() {
	if r, w, err := os.Pipe(); err == nil {
		_ = r.SetDeadline(time.Now())
		r.Close()
		w.Close()
	}
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Release()
	}
}

// snapshot is everything that may leak, as kind -> identity -> description.
type snapshot map[string]map[string]string

func (s snapshot) minus(before snapshot) (leaks []string) {
	for kind, m := range s {
		for id, what := range m {
			if _, ok := before[kind][id]; !ok {
				leaks = append(leaks, kind+" "+what)
			}
		}
	}
	slices.Sort(leaks)
	return leaks
}

func takeSnapshot() snapshot {
	return snapshot{
		"process":        processSnapshot(),
		"mount":          mountSnapshot(),
		"namespace":      namespaceSnapshot(),
		"cgroup":         cgroupSnapshot(),
		"descriptor":     descriptorSnapshot(),
		"goroutine":      goroutineSnapshot(),
		"temporary file": tempSnapshot(),
	}
}

func processSnapshot() map[string]string {
	m := map[string]string{}
	for pid, s := range family(marker, os.Getpid(), born) {
		what := fmt.Sprintf("%d (%s), state %c, parent %d", pid, s.comm, s.state, s.ppid)
		if s.state == 'Z' && s.ppid == os.Getpid() {
			what += ": a zombie that was not waited for"
		}
		m[fmt.Sprintf("%d@%d", pid, s.start)] = what
	}
	return m
}

// foreign reports whether a name carries the tag of another test process that
// is still alive (see Name): packages may be tested side by side.
func foreign(name string) bool {
	for _, tag := range tagPattern.FindAllStringSubmatch(name, -1) {
		if tag[1] == fmt.Sprint(os.Getpid()) {
			return false
		}
		if _, err := os.Stat("/proc/" + tag[1]); err == nil {
			return true
		}
	}
	return false
}

var tagPattern = regexp.MustCompile(`pft(\d+)[x.]`)

// mountSnapshot lists the mounts under our temporary directory or with our
// name in them.
func mountSnapshot() map[string]string {
	m := map[string]string{}
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 10 {
			continue
		}
		ours := ownTemp != "" && strings.HasPrefix(f[4], ownTemp+"/") ||
			strings.Contains(line, "pageferry") || strings.Contains(line, "/pft")
		if ours && !foreign(line) && !underOther(f[4]) {
			m[f[0]+" "+f[4]] = strings.TrimSpace(line)
		}
	}
	return m
}

// underOther reports whether path is in the temporary directory of another
// test process.
func underOther(path string) bool {
	return ownTemp != "" && strings.HasPrefix(path, filepath.Join(realTemp, "pft")) &&
		!strings.HasPrefix(path, ownTemp+"/")
}

func namespaceSnapshot() map[string]string {
	m := map[string]string{}
	dir, _ := os.ReadDir("/run/netns")
	for _, e := range dir {
		if !foreign(e.Name()) {
			m[e.Name()] = "/run/netns/" + e.Name()
		}
	}
	return m
}

// cgroupSnapshot lists the cgroups with our name, but those in which processes
// of somebody else live.
func cgroupSnapshot() map[string]string {
	m := map[string]string{}
	root, err := cgroupRoot()
	if err != nil {
		return m
	}
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		name := d.Name()
		if strings.HasPrefix(name, "pageferry") || strings.HasPrefix(name, "pft") {
			// The parent of all that the program makes may stay for a while where
			// several test processes are at work: who finds it there leaves it.
			if name == "pageferry" && childless(path) {
				return nil
			}
			if !foreign(path) && !livedInByOthers(path) {
				m[path] = path
			}
		}
		return nil
	})
	return m
}

// childless reports whether a cgroup has none below it.
func childless(cgroup string) bool {
	below, err := os.ReadDir(cgroup)
	for _, d := range below {
		if d.IsDir() {
			return false
		}
	}
	return err == nil
}

// livedInByOthers reports whether somebody else's process lives in or below a
// cgroup, or is the one after which it is named.
func livedInByOthers(cgroup string) bool {
	var pids []string
	_ = filepath.WalkDir(cgroup, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			b, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			pids = append(pids, strings.Fields(string(b))...)
		}
		return nil
	})
	for part := range strings.SplitSeq(cgroup, "/") {
		if strings.HasPrefix(part, "pageferry") {
			pids = append(pids, number.FindAllString(part, -1)...)
		}
	}
	for _, s := range pids {
		pid, err := strconv.Atoi(s)
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		if _, err := os.Stat("/proc/" + s); err != nil {
			continue
		}
		if env, ok := environ(pid); !ok || !hasMarker(env, marker) {
			return true
		}
	}
	return false
}

var number = regexp.MustCompile(`\d+`)

func descriptorSnapshot() map[string]string {
	m := map[string]string{}
	dir, _ := os.ReadDir("/proc/self/fd")
	for _, e := range dir {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil { // the one that read the directory
			continue
		}
		m[e.Name()+" "+to] = e.Name() + " -> " + to
	}
	return m
}

var goroutineHead = regexp.MustCompile(`^goroutine (\d+) `)

// goroutineSnapshot lists goroutines but those of the runtime, of the testing
// package and the caller's own.
func goroutineSnapshot() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	m := map[string]string{}
	for i, g := range strings.Split(string(buf), "\n\n") {
		id := goroutineHead.FindStringSubmatch(g)
		if i == 0 || id == nil || strings.Contains(g, "testing.(*T).Run(") ||
			strings.Contains(g, "testing.(*M).") || strings.Contains(g, "os/signal.loop") ||
			strings.Contains(g, "testing.runFuzzing") || strings.Contains(g, "internal/testutil.environ.func") {
			continue
		}
		m[id[1]] = g
	}
	return m
}

// tempSnapshot lists files in our temporary directory that t.TempDir did not
// make, and those with pageferry's name in the host's.
func tempSnapshot() map[string]string {
	m := map[string]string{}
	add := func(dir string, ours func(string) bool) {
		list, _ := os.ReadDir(dir)
		for _, e := range list {
			if ours(e.Name()) {
				m[filepath.Join(dir, e.Name())] = filepath.Join(dir, e.Name())
			}
		}
	}
	if ownTemp != "" {
		add(ownTemp, func(name string) bool {
			return name != ".marker" && !strings.HasPrefix(name, "Test") &&
				!strings.HasPrefix(name, "Benchmark") && !strings.HasPrefix(name, "Fuzz")
		})
		return m
	}
	mine := func(name string) bool {
		return strings.HasPrefix(name, "pageferry") && name != cacheName() && !foreign(name)
	}
	add(realTemp, mine)
	return m
}
