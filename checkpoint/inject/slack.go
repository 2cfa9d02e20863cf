package inject

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// slackMagic marks bootstrap code, so that code which a killed tracer left
// behind is known.
const slackMagic = "pgferry\x01"

// findSlack looks for blockSize spare bytes, zero or left by a tracer that died,
// at the end of an executable mapping: the vdso has about 1500, and the last page
// of a program's text is padded with zeros too. A fresh place is better than one
// that was used: a thread may still be on its way through that.
func findSlack(mem *os.File, maps []proc.Mapping) (uint64, error) {
	var used uint64
	for _, pass := range []bool{true, false} {
		for _, m := range maps {
			if m.Prot&unix.PROT_EXEC == 0 || m.Prot&unix.PROT_WRITE != 0 || m.Shared || m.Name == "[vsyscall]" || (m.Name == "[vdso]") != pass {
				continue
			}
			if !pass && !strings.HasPrefix(m.Name, "/") {
				continue
			}
			at, again := slackIn(mem, m.Range)
			if at != 0 {
				return at, nil
			}
			if used == 0 {
				used = again
			}
		}
	}
	if used != 0 {
		return used, nil
	}
	return 0, ErrNoRoom
}

func slackIn(mem *os.File, r page.Range) (fresh, used uint64) {
	var last [page.Size]byte
	if _, err := mem.ReadAt(last[:], int64(r.End-page.Size)); err != nil {
		return 0, 0
	}
	for at := page.Size - blockSize; at >= 0; at -= blockSize {
		b := last[at : at+blockSize]
		switch {
		case len(bytes.Trim(b, "\x00")) == 0:
			return uint64(r.End) - page.Size + uint64(at), 0
		case bytes.HasPrefix(b, []byte(slackMagic)):
			used = uint64(r.End) - page.Size + uint64(at)
		default:
			return 0, used
		}
	}
	return 0, used
}

// wipeSlack makes the bootstrap code zeros again. No thread may be in it.
func (t *Target) wipeSlack() error {
	if t.slack == 0 {
		return nil
	}
	return t.writeCode(page.Addr(t.slack), make([]byte, blockSize))
}

// boot makes one system call on thread tid by the bootstrap code.
func (t *Target) boot(tid int, nr uintptr, args ...uint64) (uint64, error) {
	th := t.threads[tid]
	b := make([]byte, 0, blockSize)
	b = append(b, slackMagic...)
	b = append(b, bootCode...)
	b = append(b, resumeBlock(&th.how.Ready, th.mask)...)
	Point("boot-write")
	// While the thread still stands in this very code only its own data is
	// rewritten, with the same bytes.
	if err := t.writeCode(page.Addr(t.slack), b); err != nil {
		return 0, err
	}
	var a [6]uint64
	copy(a[:], args)
	r := th.how.Ready
	r.Rip = t.slack + uint64(len(slackMagic))
	r.Rax = uint64(nr)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = a[0], a[1], a[2], a[3], a[4], a[5]
	r.Rbp = uint64(t.sig)
	if err := t.start(th, &r); err != nil {
		return 0, err
	}
	if _, err := t.wait(th, r.Rip+bootEnd); err != nil {
		return 0, err
	}
	if err := sys.PtraceGetRegs(tid, &r); err != nil {
		return 0, t.gone(err)
	}
	if e := -int64(r.R12); e > 0 && e < 4096 {
		return 0, fmt.Errorf("injected %s in pid %d: %w", sys.SyscallName(nr), t.pid, unix.Errno(e))
	}
	return r.R12, nil
}

// CleanVDSO zeroes what of the bootstrap code a killed tracer left in the bytes
// of a vdso.
func CleanVDSO(b []byte) {
	for at := len(b) - blockSize; at >= 0; at -= blockSize {
		if bytes.HasPrefix(b[at:], []byte(slackMagic)) {
			clear(b[at : at+blockSize])
		}
	}
}
