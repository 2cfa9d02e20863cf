package bench

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Limits measures what moving pages is made of, stage by stage, each by itself
// and with nothing of ours around it. The unit is the processor time of a GiB,
// which does not depend on who else runs:
//
//	read   process_vm_readv from another process, in the best of pieces of 64 KiB, 256 KiB and 1 MiB
//	zero   looking for zero pages
//	sum    CRC32C of every page; both ends do it
//	seal   AES-128-GCM over records of 16 KiB, at both ends; with TLS only
//	socket one TCP stream between two processes on the two hosts, in writes of 256 KiB; both ends together
//	place  UFFDIO_COPY into fresh memory, in the best of pieces of 64 KiB, 256 KiB and 1 MiB;
//	       with Landing process_vm_writev into fresh memory of another process
//
// # The ceiling
//
// Both ends share this machine's processors, so all stages of all pages must fit
// into their time: with c processors and s seconds of processor time for a GiB,
// nothing can be faster than c/s GiB/s, however the work is divided among
// threads. c is the number of processors, but not above four, as the two bulk
// lanes have one thread at each end.
type Limits struct {
	touch  string
	held   *exec.Cmd
	out    *os.File
	mem    *proc.Memory
	region page.Range
	sink   *sink
	buf    []byte // of 1 MiB, outside the heap
	data   []byte // random pages, likewise
	aead   cipher.AEAD
	bytes  int

	costs map[string][]float64 // seconds of processor time per GiB, one per turn
	wire  []float64            // GiB/s of one TCP stream
}

// pieces are the sizes in which memory is read and placed.
var pieces = []int{64 << 10, 256 << 10, 1 << 20}

// NewLimits makes everything ready to measure with bytes per stage and turn.
// touch is the compiled TouchSource. Close it before the stage.
func (s *Stage) NewLimits(touch string, bytes int) (_ *Limits, err error) {
	l := &Limits{touch: touch, bytes: max(bytes, 1<<20), costs: map[string][]float64{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, b := range []*[]byte{&l.buf, &l.data} {
		if *b, err = unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
			return nil, fmt.Errorf("limits: %w", err)
		}
	}
	rand.Read(l.data)
	block, err := aes.NewCipher(l.data[:16])
	if err != nil {
		return nil, err
	}
	if l.aead, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	if l.sink, err = s.newSink(); err != nil {
		return nil, err
	}
	return l, l.hold()
}

// hold starts the process that is read.
func (l *Limits) hold() (err error) {
	mib := min(256, l.bytes>>20)
	l.region = page.Range{Start: touchBase, End: touchBase + page.Addr(mib)<<20}
	var w *os.File
	if l.out, w, err = os.Pipe(); err != nil {
		return err
	}
	defer w.Close()
	cmd := exec.Command(l.touch, "hold", strconv.Itoa(mib))
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		return err
	}
	l.held = cmd
	_ = l.out.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := l.out.Read(make([]byte, 16)); err != nil {
		return fmt.Errorf("limits: the process to read from: %w", err)
	}
	l.mem, err = proc.OpenMemory(cmd.Process.Pid)
	return err
}

// Close ends what was started. Idempotent.
func (l *Limits) Close() error {
	var errs []error
	if l.sink != nil {
		errs = append(errs, l.sink.close())
	}
	if l.mem != nil {
		errs = append(errs, l.mem.Close())
	}
	if l.held != nil {
		_ = l.held.Process.Kill()
		_ = l.held.Wait() // says that it was killed
	}
	if l.out != nil {
		errs = append(errs, l.out.Close())
	}
	for _, b := range [][]byte{l.buf, l.data} {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	*l = Limits{costs: l.costs, wire: l.wire}
	return errors.Join(errs...)
}

// Turn measures every stage once.
func (l *Limits) Turn(ctx context.Context) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var sums []uint32
	var sealed []byte
	nonce := make([]byte, l.aead.NonceSize())
	work := map[string]func(buf []byte) error{
		"zero": func(b []byte) error {
			for len(b) > 0 {
				_, n := codec.Run(b)
				b = b[n<<page.Shift:]
			}
			return nil
		},
		"sum": func(b []byte) error { sums = codec.AppendSums(sums[:0], b); return nil },
		"seal": func(b []byte) error {
			const record = 16 << 10
			for ; len(b) > 0; b = b[record:] {
				sealed = l.aead.Seal(sealed[:0], nonce, b[:record], nil)
				if _, err := l.aead.Open(sealed[:0], nonce, sealed, nil); err != nil {
					return err
				}
			}
			return nil
		},
	}
	for name, f := range work {
		cost, err := l.cpu(writeBytes, func(int) error { return f(l.data[:writeBytes]) })
		if err != nil {
			return fmt.Errorf("limits: %s: %w", name, err)
		}
		l.costs[name] = append(l.costs[name], cost)
	}
	for _, p := range pieces {
		cost, err := l.read(p)
		if err != nil {
			return fmt.Errorf("limits: read: %w", err)
		}
		name := fmt.Sprintf("read %d KiB", p>>10)
		l.costs[name] = append(l.costs[name], cost)
		if cost, err = l.place(p); err != nil {
			return fmt.Errorf("limits: place: %w", err)
		}
		name = fmt.Sprintf("place %d KiB", p>>10)
		l.costs[name] = append(l.costs[name], cost)
	}
	cpu, wall, err := l.sink.send(ctx, l.bytes)
	if err != nil {
		return fmt.Errorf("limits: socket: %w", err)
	}
	l.costs["socket"] = append(l.costs["socket"], cpu.Seconds()/(float64(l.bytes)/GiB))
	l.wire = append(l.wire, Rate(float64(l.bytes), wall))
	return nil
}

// cpu calls f for every step bytes of l.bytes, with their offset, and returns
// the seconds of this thread's processor time per GiB.
func (l *Limits) cpu(step int, f func(off int) error) (float64, error) {
	began, err := threadCPU()
	if err != nil {
		return 0, err
	}
	done := 0
	for ; done+step <= l.bytes; done += step {
		if err := f(done); err != nil {
			return 0, err
		}
	}
	end, err := threadCPU()
	return (end - began).Seconds() / (float64(done) / GiB), err
}

func threadCPU() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

func (l *Limits) read(piece int) (float64, error) {
	size := int(l.region.Bytes())
	return l.cpu(piece, func(off int) error {
		at := l.region.Start + page.Addr(off%(size-piece+1)&^(page.Size-1))
		return l.mem.ReadPages([]page.Range{{Start: at, End: at + page.Addr(piece)}}, l.buf[:piece])
	})
}

// place copies into memory that nobody has touched.
func (l *Limits) place(piece int) (float64, error) {
	fd, err := sys.Userfaultfd(sys.UffdUserModeOnly | unix.O_CLOEXEC)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if _, _, err := sys.UffdAPI(fd, 0); err != nil {
		return 0, err
	}
	dst, err := unix.Mmap(-1, 0, l.bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Munmap(dst) }()
	backing, err := back(l.bytes + backAhead)
	if err != nil {
		return 0, err
	}
	defer backing.Release()
	to := addr(dst)
	if _, err := sys.UffdRegister(fd, to, uint64(len(dst)), sys.UffdioRegisterModeMissing); err != nil {
		return 0, err
	}
	return l.cpu(piece, func(off int) error {
		n, err := sys.UffdCopy(fd, to+uint64(off), l.data[:piece], 0)
		if err == nil && n != int64(piece) {
			err = fmt.Errorf("%d of %d bytes placed", n, piece)
		}
		return err
	})
}

// Costs are the medians so far, in seconds of processor time per GiB, of the
// stages in the order of Limits.
func (l *Limits) Costs() (names []string, costs []float64) {
	best := func(stage string) float64 {
		b := 0.0
		for _, p := range pieces {
			if c := Median(l.costs[fmt.Sprintf("%s %d KiB", stage, p>>10)]); b == 0 || c < b {
				b = c
			}
		}
		return b
	}
	return []string{"read", "zero", "sum", "seal", "socket", "place"}, []float64{best("read"), Median(l.costs["zero"]),
		Median(l.costs["sum"]), Median(l.costs["seal"]), Median(l.costs["socket"]), best("place")}
}

// Wire is the median of GiB/s of one TCP stream.
func (l *Limits) Wire() float64 { return Median(l.wire) }

// Ceiling is the most GiB/s that the stages allow, with TLS on the page lanes or
// without.
func (l *Limits) Ceiling(tls bool) float64 {
	sum := l.Sum(tls)
	if sum == 0 {
		return 0
	}
	return float64(min(runtime.NumCPU(), 4)) / (sum / 1000)
}

// Sum is the milliseconds of processor time that the stages take for a GiB.
func (l *Limits) Sum(tls bool) float64 {
	_, c := l.Costs()
	sum := c[0] + c[1] + 2*c[2] + c[4] + c[5]
	if tls {
		sum += c[3] // seal and open were measured together
	}
	return sum * 1000
}
