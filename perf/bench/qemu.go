package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/pageferry/pageferry/appliance/lab"
)

// qemuBinary is the peer; nothing of it is measured where it is not installed.
const qemuBinary = "qemu-system-x86_64"

// QEMU is a virtual machine of which nearly all memory is random data, and which
// is moved between two hosts. It has no operating system: a few instructions fill
// the memory and halt. It is emulated (TCG), as the speed of its processor does not
// matter: it stands still.
type QEMU struct {
	stage   *Stage
	touched bool
	bytes   uint64 // of memory
	kernel  string
	n       int // started so far
	host    *lab.Host
	vm      *vm
}

// vm is one process of QEMU.
type vm struct {
	prog *lab.Program
	qmp  *qmp
	said string // the file that has what the guest says
}

const (
	// fillFrom is where random data begin; the code is below, and what the firmware
	// keeps is above fillTop from the end.
	fillFrom = 2 << 20
	fillTop  = 1 << 20
	// MaxQEMU keeps all memory below the hole for devices, which begins at 3.5 GiB
	// (hw/i386/pc_piix.c, max_ram_below_4g): the code knows 32 bits.
	MaxQEMU = 3580 << 20
	// multifd is how many channels the pages go over.
	multifd     = 4
	qemuPort    = "7398"
	qemuAtMost  = 3 * time.Minute // for filling and for a migration
	qemuLookFor = time.Millisecond
)

// fillKernel is a kernel in the multiboot format (header with addresses, so that no
// ELF is needed) that fills the memory of a machine of bytes bytes.
func fillKernel(bytes uint64) []byte {
	const load, magic, flags = 1 << 20, 0x1badb002, 1 << 16
	le := binary.LittleEndian
	var k []byte
	for _, v := range []uint32{magic, flags, 1<<32 - magic - flags, load, load, 0, 0, load + 32} {
		k = le.AppendUint32(k, v)
	}
	k = le.AppendUint32(append(k, 0xfc, 0xbf), fillFrom)                     // cld; mov edi
	k = le.AppendUint32(append(k, 0xb9), uint32((bytes-fillFrom-fillTop)/4)) // mov ecx
	k = le.AppendUint32(append(k, 0xb8), 0x2545f491)                         // mov eax
	k = le.AppendUint32(append(k, 0x69, 0xc0), 1664525)                      // imul eax, eax: Numerical Recipes, ranqd1
	k = le.AppendUint32(append(k, 0x05), 1013904223)                         // add eax
	return append(k, 0xab, 0xe2, 0xf2,                                       // stosd; loop to imul
		0x66, 0xba, 0xe9, 0x00, 0xb0, 'd', 0xee, // mov dx, 0xe9; mov al; out: the debug console
		0xf4, 0xeb, 0xfd) // hlt; jmp to hlt
}

// NewQEMU starts a machine with up to bytes of memory, less than asked for where
// that is above MaxQEMU. With touched the memory of the processes that take it over
// is touched beforehand.
func (s *Stage) NewQEMU(ctx context.Context, bytes uint64, touched bool) (*QEMU, error) {
	q := &QEMU{stage: s, touched: touched, bytes: min(bytes, MaxQEMU), kernel: filepath.Join(s.cfg.Dir, "fill")}
	if err := os.WriteFile(q.kernel, fillKernel(q.bytes), 0o644); err != nil {
		return nil, err
	}
	q.host, _ = s.Hosts()
	var err error
	if q.vm, err = q.start(ctx, q.host); err != nil {
		return nil, err
	}
	return q, q.filled(ctx)
}

// Bytes is how much random data there is.
func (q *QEMU) Bytes() uint64 { return q.bytes - fillFrom - fillTop }

func (q *QEMU) start(ctx context.Context, h *lab.Host, more ...string) (_ *vm, err error) {
	q.n++
	path := filepath.Join(q.stage.cfg.Dir, fmt.Sprintf("qemu%d", q.n))
	v := &vm{said: path + ".out"}
	prealloc := "off"
	if q.touched && len(more) > 0 {
		prealloc = "on"
	}
	cmd := exec.Command(qemuBinary, append([]string{"-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "pc,memory-backend=ram", "-m", fmt.Sprintf("%dM", q.bytes>>20),
		"-object", fmt.Sprintf("memory-backend-ram,id=ram,size=%d,prealloc=%s", q.bytes, prealloc),
		"-kernel", q.kernel, "-debugcon", "file:" + v.said, "-qmp", "unix:" + path + ",server=on,wait=off"}, more...)...)
	out, err := os.Create(path + ".err")
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if v.prog, err = h.Start("qemu", cmd); err != nil {
		return nil, err
	}
	q.stage.ends = append(q.stage.ends, v.prog)
	err = waitFor(ctx, qemuAtMost, v.prog, func() (err error) { v.qmp, err = dialQMP(ctx, path); return err }, func() error {
		b, _ := os.ReadFile(path + ".err")
		return fmt.Errorf("it ended: %s", b)
	})
	if err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	return v, nil
}

// filled waits until the guest says that its memory is full.
func (q *QEMU) filled(ctx context.Context) error {
	return waitFor(ctx, qemuAtMost, q.vm.prog, func() error {
		if b, err := os.ReadFile(q.vm.said); err != nil || len(b) == 0 {
			return fmt.Errorf("qemu: the guest has not filled its memory: %w", errors.Join(err))
		}
		return nil
	}, func() error { return errors.New("qemu: it ended") })
}

// Move migrates the machine to the other host by multifd and returns how long it
// took and its downtime, as QEMU says.
func (q *QEMU) Move(ctx context.Context) (total, downtime time.Duration, err error) {
	from, to := q.stage.Hosts()
	if q.host == to {
		to = from
	}
	next, err := q.start(ctx, to, "-incoming", "defer")
	if err != nil {
		return 0, 0, err
	}
	for _, v := range []*vm{next, q.vm} {
		type capability struct {
			Name  string `json:"capability"`
			State bool   `json:"state"`
		}
		err = errors.Join(
			v.qmp.do("migrate-set-capabilities", map[string]any{"capabilities": []capability{{"multifd", true}}}, nil),
			v.qmp.do("migrate-set-parameters", map[string]any{"multifd-channels": multifd, "max-bandwidth": uint64(100 * GiB)}, nil))
		if err != nil {
			return 0, 0, err
		}
	}
	uri := map[string]string{"uri": "tcp:" + net.JoinHostPort(to.Addr().String(), qemuPort)}
	if err = next.qmp.do("migrate-incoming", uri, nil); err == nil {
		err = q.vm.qmp.do("migrate", uri, nil)
	}
	if err != nil {
		return 0, 0, err
	}
	for began := time.Now(); ; time.Sleep(qemuLookFor) { // it has no call that waits
		var info struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
			Total  int64  `json:"total-time"`
			Down   int64  `json:"downtime"`
		}
		if err := q.vm.qmp.do("query-migrate", nil, &info); err != nil {
			return 0, 0, err
		}
		switch {
		case info.Status == "completed":
			err := q.vm.end()
			q.vm, q.host = next, to
			return time.Duration(info.Total) * time.Millisecond, time.Duration(info.Down) * time.Millisecond, err
		case info.Status == "failed" || time.Since(began) > qemuAtMost || ctx.Err() != nil:
			return 0, 0, fmt.Errorf("qemu: migration %s after %v: %s", info.Status, time.Since(began), info.Error)
		}
	}
}

func (v *vm) end() error {
	err := v.qmp.do("quit", nil, nil)
	err = errors.Join(err, v.qmp.close())
	<-v.prog.Done()
	return err
}

// Close ends it. Idempotent.
func (q *QEMU) Close() error {
	if q.vm == nil {
		return nil
	}
	v := q.vm
	q.vm = nil
	return v.end()
}
