package bench

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
)

// Landing makes l measure the placing of pages as the rounds of pre-copy do it:
// into a process that does not run yet, by process_vm_writev.
func (l *Limits) Landing() { l.landing = true }

// land writes into memory of another process that nobody has touched.
func (l *Limits) land(piece int) (float64, error) {
	out, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer out.Close()
	cmd := exec.Command(l.touch, "fresh", strconv.Itoa(l.bytes>>20))
	cmd.Stdout = w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // says that it was killed
	}()
	_ = out.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := out.Read(make([]byte, 16)); err != nil {
		return 0, fmt.Errorf("the process to write to: %w", err)
	}
	backing, err := back(l.bytes + backAhead)
	if err != nil {
		return 0, err
	}
	defer backing.Release()
	return l.cpu(piece, func(off int) error {
		local := [1]unix.Iovec{{Base: &l.data[0], Len: uint64(piece)}}
		remote := [1]unix.RemoteIovec{{Base: uintptr(touchBase) + uintptr(off), Len: piece}}
		n, err := sys.ProcessVMWritevNow(cmd.Process.Pid, local[:], remote[:])
		if err == nil && n != piece {
			err = fmt.Errorf("%d of %d bytes written", n, piece)
		}
		return err
	})
}
