package inject

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// The bytes in the Go source are what the assembler makes of testdata.
func TestCodeIsWhatTheListingSays(t *testing.T) {
	testutil.Require(t, testutil.AMD64, testutil.Program("as"), testutil.Program("objcopy"))
	for name, want := range map[string][]byte{
		"stub": stubCode, "boot": bootCode, "resume": resumeBlock(&sys.Regs{}, 0), "gate": gateCode,
	} {
		obj, bin := filepath.Join(t.TempDir(), name+".o"), filepath.Join(t.TempDir(), name+".bin")
		for _, cmd := range []*exec.Cmd{
			exec.Command("as", "-o", obj, filepath.Join("testdata", name+".s")),
			exec.Command("objcopy", "-O", "binary", "-j", ".text", obj, bin),
		} {
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
			}
		}
		got, err := os.ReadFile(bin)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s.s gives\n%x, the source has\n%x", name, got, want)
		}
	}
	syscall := []byte{0x0f, 0x05}
	if !bytes.HasSuffix(stubCode[:stubEnd], syscall) || !bytes.HasSuffix(bootCode[:bootEnd], syscall) {
		t.Error("stubEnd or bootEnd does not lie behind a system call")
	}
	if n := len(slackMagic) + len(bootCode) + resumeSize; n > blockSize {
		t.Errorf("the bootstrap code takes %d bytes of %d", n, blockSize)
	}
}

func TestChooseSignal(t *testing.T) {
	bit := func(ss ...unix.Signal) (m uint64) {
		for _, s := range ss {
			m |= sys.SigBit(int(s))
		}
		return m
	}
	for _, c := range []struct {
		name                  string
		ignored, caught, busy uint64
		stopped               bool
		want                  unix.Signal
	}{
		{"plain", 0, 0, 0, false, unix.SIGURG},
		{"catches SIGURG", 0, bit(unix.SIGURG), 0, false, unix.SIGWINCH},
		{"SIGURG pending", 0, 0, bit(unix.SIGURG, unix.SIGWINCH), false, unix.SIGCHLD},
		{"ignores SIGPIPE", bit(unix.SIGPIPE), bit(unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD), 0, false, unix.SIGPIPE},
		{"Go", bit(), bit(unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD), 0, false, unix.SIGCONT},
		{"Go, stopped", 0, bit(unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD), 0, true, unix.SIGURG},
		{"catches all", 0, ^uint64(0), 0, false, unix.SIGURG},
		{"ignores faults and stops only", bit(unix.SIGSEGV, unix.SIGTSTP), ^bit(unix.SIGSEGV, unix.SIGTSTP), 0, true, unix.SIGURG},
	} {
		if got := chooseSignal(c.ignored, c.caught, c.busy, c.stopped); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, unix.SignalName(got), unix.SignalName(c.want))
		}
	}
}

func TestInterpret(t *testing.T) {
	const ip = 0x1002
	minus := func(n int64) uint64 { return uint64(-n) }
	for _, c := range []struct {
		name                      string
		orig, rax                 uint64
		code                      int
		kernel, ready, fresh, rip uint64
	}{
		{"not in a call", ^uint64(0), 5, 0, 5, 5, 5, ip},
		{"a call that has returned", unix.SYS_READ, 7, 0, 7, 7, 7, ip},
		{"a failed one", unix.SYS_READ, minus(int64(unix.EBADF)), 0, minus(int64(unix.EBADF)), minus(int64(unix.EBADF)), minus(int64(unix.EBADF)), ip},
		{"read", unix.SYS_READ, minus(ERESTARTSYS), ERESTARTSYS, minus(ERESTARTSYS), unix.SYS_READ, unix.SYS_READ, ip - 2},
		{"pause", unix.SYS_PAUSE, minus(ERESTARTNOHAND), ERESTARTNOHAND, minus(ERESTARTNOHAND), unix.SYS_PAUSE, unix.SYS_PAUSE, ip - 2},
		{"nanosleep", unix.SYS_NANOSLEEP, minus(ERESTART_RESTARTBLOCK), ERESTART_RESTARTBLOCK,
			minus(ERESTART_RESTARTBLOCK), unix.SYS_RESTART_SYSCALL, unix.SYS_NANOSLEEP, ip - 2},
		{"epoll_wait", unix.SYS_EPOLL_WAIT, minus(int64(unix.EINTR)), ERESTARTNOHAND, minus(ERESTARTNOHAND), unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_WAIT, ip - 2},
		{"close, which must not be repeated", unix.SYS_CLOSE, minus(int64(unix.EINTR)), 0,
			minus(int64(unix.EINTR)), minus(int64(unix.EINTR)), minus(int64(unix.EINTR)), ip},
	} {
		marked := Interpret(sys.Regs{Orig_rax: c.orig | 77<<32, Rax: c.rax, Rip: ip})
		in := Interpret(sys.Regs{Orig_rax: c.orig, Rax: c.rax, Rip: ip})
		if in.Code != c.code || in.Kernel.Rax != c.kernel || in.Kernel.Rip != ip || in.Kernel.Orig_rax != c.orig ||
			in.Ready.Rax != c.ready || in.Ready.Rip != c.rip || in.Fresh.Rax != c.fresh || in.Fresh.Rip != c.rip ||
			int64(in.Ready.Orig_rax) != -1 || int64(in.Fresh.Orig_rax) != -1 {
			t.Errorf("%s: %+v", c.name, in)
		}
		if c.code == 0 {
			continue
		}
		again := in
		again.SetMark(77)
		if in.Mark != 0 || marked.Mark != 77 || marked.Nr != c.orig || marked.Kernel != in.Kernel || marked.Ready != in.Ready ||
			marked.Fresh != in.Fresh || again.Kernel.Orig_rax != c.orig|77<<32 || again.Ready != in.Ready {
			t.Errorf("%s, with a mark: %+v", c.name, marked)
		}
	}
}
