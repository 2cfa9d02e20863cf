package vm

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pageferry/pageferry/test/vm/link"
)

func inside() bool { return os.Getenv(link.EnvGuest) == "1" }

// qemu is QEMU's program for this processor.
const qemu = "qemu-system-x86_64"

func findQEMU() (string, error) {
	path, err := exec.LookPath(qemu)
	if err != nil {
		return "", fmt.Errorf("%w (make test installs it; on Debian: apt-get install qemu-system-x86)", err)
	}
	return path, nil
}

// machine is a running QEMU. Its standard input and output are the link, its
// standard error is the console: nothing of it has a name that could be left.
type machine struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     io.Reader
	console tail
	ended   chan struct{} // closed when it is gone and was waited for
}

// boot starts a machine. The calling goroutine must be locked to its thread, and
// stay so until the machine is gone.
func boot(image Image, job Job) (*machine, error) {
	path, err := findQEMU()
	if err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	m := &machine{ended: make(chan struct{})}
	m.cmd = exec.Command(path, arguments(image, job)...)
	m.cmd.Stderr = &m.console
	// prctl(2), PR_SET_PDEATHSIG: whatever ends us ends the machine.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true}
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	// Not StdoutPipe, which Wait closes: the last frames would be lost.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	m.cmd.Stdout, m.out = w, r
	err = m.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("vm: %w", err)
	}
	go func() {
		_ = m.cmd.Wait()
		close(m.ended)
	}()
	return m, nil
}

// arguments are QEMU's. The kernel boots on one processor, and init starts the
// others: QEMU 7.2 may translate an instruction while another processor patches it
// (static keys, of which a boot flips many), and keep the breakpoint that was there
// for a moment: one boot of forty ended in "Oops: int3".
func arguments(image Image, job Job) []string {
	return []string{
		"-accel", "tcg,thread=multi", "-cpu", "max",
		"-smp", strconv.Itoa(job.CPUs), "-m", strconv.Itoa(job.Memory),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-net", "none",
		"-kernel", image.Kernel, "-initrd", image.Initrd,
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off 8250.nr_uarts=1 maxcpus=1 lpj=12000000",
		"-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console",
		"-chardev", "stdio,id=link,signal=off", "-device", "virtio-serial-pci",
		"-device", "virtserialport,chardev=link,name=" + link.Port,
		"-virtfs", "local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on",
	}
}

// kill ends the machine and returns when it is gone.
func (m *machine) kill() {
	_ = m.cmd.Process.Kill()
	<-m.ended
	if c, ok := m.out.(io.Closer); ok {
		_ = c.Close()
	}
}

// off waits for a machine that turns itself off, but not for long.
func (m *machine) off() {
	select {
	case <-m.ended:
	case <-time.After(offLimit):
	}
	m.kill()
}

// said is the end of the console's text, for an error message.
func (m *machine) said() string {
	text := strings.TrimSpace(m.console.String())
	if text == "" {
		return "\n(the console says nothing)"
	}
	return "\nthe console's last lines:\n" + text
}

// tail keeps the end of what is written to it. It is for many goroutines.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailBytes = 8 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	if n := len(t.text) - tailBytes; n > 0 {
		t.text = append([]byte(nil), t.text[n:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(strings.ReplaceAll(string(t.text), "\r", ""), "?")
}
