package testutil

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// SelfChecking is a program that verifies itself; see test/programs.
type SelfChecking struct {
	*Process
	// Identity is what its heartbeats are sent under.
	Identity string
	// Report is the file to which it writes its outcome.
	Report   string
	recorder *Recorder
}

// ProgramConfig says how to start a program that verifies itself. The zero
// value is fine.
type ProgramConfig struct {
	// Recorder gets the heartbeats. Default: none are sent.
	Recorder *Recorder
	// Threads is how many register threads everything has. Default: 4.
	Threads int
	// Args are appended to the command line: for everything --only MODULE,...,
	// --without CHECK,..., --with fork, --sigcont-ok and others (see its --help).
	Args []string
	// Limit is how long it may run. Default: DefaultLimit.
	Limit time.Duration
}

var identities atomic.Uint32

// StartEverything starts test/programs/everything and waits until it is ready.
func StartEverything(t testing.TB, cfg ProgramConfig) *SelfChecking {
	t.Helper()
	Require(t, AMD64)
	if cfg.Threads == 0 {
		cfg.Threads = 4
	}
	dir := filepath.Dir(Socket(t, "x")) // its unix sockets need a short path
	return startProgram(t, CC(t, "everything"), cfg, "--dir", dir, "--threads", strconv.Itoa(cfg.Threads))
}

// StartChurn starts the part of everything that gives up, moves, grows and
// unmaps memory all the time and verifies every byte of it. It has cfg.Threads
// threads. With Args --with fork it forks, too.
func StartChurn(t testing.TB, cfg ProgramConfig) *SelfChecking {
	t.Helper()
	cfg.Args = append([]string{"--only", "churn"}, cfg.Args...)
	return StartEverything(t, cfg)
}

// StartGo starts test/programs/gcprog, a Go program with its collector busy.
func StartGo(t testing.TB, cfg ProgramConfig) *SelfChecking {
	t.Helper()
	return startProgram(t, GoProgram(t, "./test/programs/gcprog"), cfg)
}

// StartWorkload starts the program of perf/workload, such as with Args "--size",
// "64MiB", "--rate", "100MiB/s", "--pattern", "edge".
func StartWorkload(t testing.TB, cfg ProgramConfig) *SelfChecking {
	t.Helper()
	return startProgram(t, GoProgram(t, "./test/programs/workload"), cfg)
}

// StartPython starts test/programs/selfcheck.py.
func StartPython(t testing.TB, cfg ProgramConfig) *SelfChecking {
	t.Helper()
	Require(t, Program("python3"))
	return startProgram(t, pythonPath(t), cfg, "-u", filepath.Join(ModuleRoot(t), "test", "programs", "selfcheck.py"))
}

func startProgram(t testing.TB, path string, cfg ProgramConfig, args ...string) *SelfChecking {
	t.Helper()
	s := &SelfChecking{
		Identity: fmt.Sprintf("%s-%d", strings.TrimSuffix(filepath.Base(args0(path, args)), ".py"), identities.Add(1)),
		Report:   filepath.Join(t.TempDir(), "report"),
		recorder: cfg.Recorder,
	}
	args = append(args, "--report", s.Report, "--identity", s.Identity)
	if cfg.Recorder != nil {
		args = append(args, "--heartbeat", cfg.Recorder.Address)
	}
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	s.Process = StartCmd(t, exec.Command(path, append(args, cfg.Args...)...), cfg.Limit)
	s.WaitText("ready", 60*time.Second)
	return s
}

// args0 is the script where path is an interpreter.
func args0(path string, args []string) string {
	for _, a := range args {
		if strings.HasSuffix(a, ".py") {
			return a
		}
	}
	return path
}

// Check fails the test if the program has found something wrong by now, or is
// not there any more.
func (s *SelfChecking) Check() {
	s.t.Helper()
	if r := s.outcome(); r != "" {
		s.t.Fatalf("%s, pid %d: %s", s.Identity, s.Pid(), r)
	}
	if !s.Alive() {
		s.t.Fatalf("%s, pid %d, is gone and has said nothing", s.Identity, s.Pid())
	}
}

// Verify ends the program, lets it verify everything, and fails the test unless
// it says that all is well.
func (s *SelfChecking) Verify() {
	s.t.Helper()
	s.Check()
	s.Signal(unix.SIGTERM)
	_ = s.Wait(60 * time.Second)
	if r := s.outcome(); r != "ok" {
		s.t.Fatalf("%s, pid %d, did not verify: %q", s.Identity, s.Pid(), r)
	}
}

// outcome is what the program reported, "" if nothing.
func (s *SelfChecking) outcome() string {
	b, _ := os.ReadFile(s.Report)
	return strings.TrimSpace(string(b))
}

// Beat waits until n more heartbeats have arrived: the program runs, wherever.
func (s *SelfChecking) Beat(n uint64) Beats {
	s.t.Helper()
	b := s.recorder.WaitBeats(s.Identity, n, 30*time.Second)
	if len(b.Bad) > 0 {
		s.t.Fatalf("%s, pid %d: %s", s.Identity, s.Pid(), b.Bad[0])
	}
	return b
}
