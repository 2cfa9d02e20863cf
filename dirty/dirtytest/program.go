package dirtytest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Program is a process that runs test/programs/mapchurn.
type Program struct {
	*testutil.Process
	t   testing.TB
	in  *os.File
	out *bufio.Reader

	mu   sync.Mutex
	held int // stops without their resume
}

// Start starts one, with its first threads at rest.
func Start(t testing.TB) *Program {
	t.Helper()
	path := testutil.CC(t, "mapchurn")
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inW.Close(); outR.Close() })
	cmd := exec.Command(path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, os.Stderr
	p := &Program{t: t, in: inW, out: bufio.NewReader(outR)}
	p.Process = testutil.StartCmd(t, cmd, testutil.DefaultLimit)
	inR.Close()
	outW.Close()
	p.Do("churn 0") // it has come to its own code
	return p
}

// Do gives it a command and returns the answer.
func (p *Program) Do(format string, args ...any) string {
	p.t.Helper()
	line := fmt.Sprintf(format, args...)
	answer, err := p.do(line)
	if err != nil {
		p.t.Fatalf("%q: %v", line, err)
	}
	return answer
}

func (p *Program) do(line string) (string, error) {
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		return "", err
	}
	answer, err := p.out.ReadString('\n')
	answer = strings.TrimSpace(answer)
	if err == nil && strings.HasPrefix(answer, "error") {
		err = fmt.Errorf("the program says: %s", answer)
	}
	return answer, err
}

// Area is one that the program made when told so.
type Area struct {
	page.Range
	Second page.Range // where it is mapped again, if it is
	FD     int        // -1, or the descriptor of the object
}

// Area makes it make one.
func (p *Program) Area(sort string, pages int) Area {
	p.t.Helper()
	var a, b uint64
	var n, fd int
	if _, err := fmt.Sscanf(p.Do("area %s %d", sort, pages), "%x %d %x %d", &a, &n, &b, &fd); err != nil {
		p.t.Fatal(err)
	}
	at := func(x uint64) page.Range {
		return page.Range{Start: page.Addr(x), End: page.Addr(x) + page.Addr(n)*page.Size}
	}
	out := Area{Range: at(a), FD: fd}
	if b != 0 {
		out.Second = at(b)
	}
	return out
}

// Poke makes it write every step-th page of r.
func (p *Program) Poke(r page.Range, step int) {
	p.t.Helper()
	p.Do("poke %x %d %d", uint64(r.Start), r.Pages(), step)
}

// Userfault is an OpenUserfault for a tracker: the program opens one, we take it
// over, and it closes its own.
func (p *Program) Userfault(context.Context) (*os.File, error) {
	answer, err := p.do("uffd")
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(answer)
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(p.Pid(), 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_getfd", err)
	}
	if _, err := p.do("close " + answer); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), nil
}

// Stop is a dirty.Stop: it returns when all threads stand still. They do until
// each Stop has been undone.
func (p *Program) Stop() (resume func() error, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held == 0 {
		if err := p.stop(); err != nil {
			return nil, err
		}
	}
	p.held++
	return func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.held--; p.held == 0 {
			p.Signal(unix.SIGCONT)
		}
		return nil
	}, nil
}

func (p *Program) stop() error {
	p.Signal(unix.SIGSTOP)
	pid := p.Pid()
	for deadline := time.Now().Add(30 * time.Second); ; {
		still, err := stopped(pid)
		if err != nil || still {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("pid %d does not stop", pid)
		}
		time.Sleep(50 * time.Microsecond)
	}
}

func stopped(pid int) (bool, error) {
	tids, err := proc.Threads(pid)
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
		if err != nil {
			return false, nil // it has just ended: look again
		}
		st, err := proc.ParseStat(b)
		if err != nil {
			return false, err
		}
		if st.State != 'T' && st.State != 'Z' && st.State != 'X' {
			return false, nil
		}
	}
	return true, nil
}
