package fusemem

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// held is a mount whose Sources give nothing, and what reads it: by read(2) and by mapping,
// people's files and the process's.
func held(t *testing.T) (*mounted, []*reader) {
	t.Helper()
	m := start(t, spec{VMAs: someVMAs, Image: true, Hold: true, Files: []fileSpec{{Path: "/f", Size: 1 << 20}}})
	var readers []*reader
	for i, how := range []string{"pread", "mmap", "mmaprandom", "mmapshared"} {
		at := uint64(i) << 16
		readers = append(readers, m.reader("mem", how, 0x7f0000000000+at<<2, page.Size), m.reader("map/0", how, at, page.Size),
			m.reader("files/f", how, at, page.Size), m.reader("map/image", how, at<<30, page.Size))
	}
	// Some ask for the same page, so not each has a READ.
	m.waiting(8)
	for _, r := range readers {
		r.stuck(t)
	}
	return m, readers
}

// stuck waits until a reader waits for the mount, for a READ or for a page, and returns the thread
// that does.
func (r *reader) stuck(t *testing.T) (thread int) {
	t.Helper()
	testutil.Eventually(t, limit, func() error {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(r.Pid()) + "/cmdline")
		if err != nil || len(b) == 0 {
			return errors.New("not executed yet")
		}
		tasks, _ := os.ReadDir("/proc/" + strconv.Itoa(r.Pid()) + "/task")
		for _, task := range tasks {
			b, _ := os.ReadFile("/proc/" + strconv.Itoa(r.Pid()) + "/task/" + task.Name() + "/wchan")
			switch string(b) {
			case "request_wait_answer", "folio_wait_bit_common", "folio_put_wait_locked", "__folio_lock_killable", "__folio_lock_or_retry":
				thread, _ = strconv.Atoi(task.Name())
				return nil
			}
		}
		return errors.New("it does not wait for the mount")
	})
	return thread
}

// interrupt sends a signal that the Go runtime handles to the thread that waits.
func (r *reader) interrupt(t *testing.T) {
	t.Helper()
	if err := unix.Tgkill(r.Pid(), r.stuck(t), unix.SIGURG); err != nil {
		t.Error(err)
	}
}

// Who is killed while he reads gets away at once, and the rest of the mount goes on.
func TestKilledReader(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m, readers := held(t)
	for _, r := range readers {
		r.Signal(unix.SIGKILL)
	}
	begin := time.Now()
	for _, r := range readers {
		_ = r.Wait(limit)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("they took %v to die", d)
	}
	// What nobody waits for any more does not stay.
	testutil.Eventually(t, limit, func() error {
		if n := m.do("waiting"); n != "0" {
			return errors.New(n + " READs of dead readers wait")
		}
		return nil
	})
	m.do("release")
	m.reader("mem", "pread", 0x7f0000000000, page.Size).mustRead(t, want(tagMem, 0x7f0000000, 1))
	m.reader("map/image", "mmap", 0, page.Size).mustRead(t, want(tagImage, 0, 1))
}

// A signal that kills nobody must not become a SIGBUS or an EFAULT of the process, however long its
// page takes. The kernel tries the fault of a system call again, once.
func TestSignalIsNoError(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Hold: true, Files: []fileSpec{{Path: "/f", Size: 1 << 20}}})
	program := []*reader{m.reader("map/0", "mmapwrite", 0, page.Size), m.reader("map/image", "mmapwrite", 0, page.Size), m.reader("map/0", "mmaprandom", 1<<19, page.Size)}
	person := m.reader("vma/7f0000000000-7f0000800000", "mmaprandom", 0, page.Size)
	m.waiting(4)
	for range 10 {
		for _, r := range program {
			r.interrupt(t)
			r.Signal(unix.SIGSTOP)
			r.Signal(unix.SIGCONT)
		}
	}
	time.Sleep(patience + lookAgain) // what a person is given
	for i, r := range program {
		if !r.Alive() {
			t.Errorf("reader %d of the process did not wait: %s", i, r.Text())
		}
	}
	if !person.Alive() {
		t.Error("a person's reader that got no signal did not wait")
	}
	m.do("release")
	program[0].mustRead(t, want(tagFile, 0, 1))
	program[1].mustRead(t, want(tagImage, 0, 1))
	program[2].mustRead(t, want(tagFile, 1<<19>>page.Shift, 1))
	person.mustRead(t, want(tagMem, 0x7f0000000, 1))
}

// A person's tool that got a signal may handle it, in the end.
func TestPatience(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Hold: true})
	r := m.reader("vma/7f0000000000-7f0000800000", "mmapwrite", 0, page.Size)
	m.waiting(1)
	r.interrupt(t)
	if _, status := r.result(t); status != int(unix.EFAULT) {
		t.Errorf("status %d, not that of a failed access", status)
	}
	m.do("release")
}

// Whatever ends the mount ends the wait of its readers, with an error and no bytes; and nothing of
// it stays.
func TestMountEnds(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	for name, end := range map[string]func(t *testing.T, m *mounted){
		"close": func(_ *testing.T, m *mounted) {
			m.do("close")
			m.do("ran")
			m.do("close")
		},
		"umount -f": func(t *testing.T, m *mounted) {
			_ = exec.Command("umount", "-f", m.dir).Run() // says that it is busy, having aborted it
			if a := <-m.ask("ran"); a != "error "+ErrGone.Error() {
				t.Errorf("Run: %s", a)
			}
		},
		"umount -l, then close": func(t *testing.T, m *mounted) {
			if err := exec.Command("umount", "-l", m.dir).Run(); err != nil {
				t.Error(err)
			}
			m.do("close")
		},
		"Unmount by another": func(t *testing.T, m *mounted) {
			if err := Unmount(m.dir); err != nil {
				t.Error(err)
			}
		},
		"end of the server": func(_ *testing.T, m *mounted) { m.in.Close() },
		"kill of the server": func(_ *testing.T, m *mounted) {
			m.proc.Kill()
		},
		"kill of the server, then of who kept the device": func(t *testing.T, m *mounted) {
			keeper := m.keep()
			m.proc.Kill()
			time.Sleep(50 * time.Millisecond)
			keeper.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			m, readers := held(t)
			end(t, m)
			for i, r := range readers {
				if b, status := r.result(t); status == 0 || len(b) > 0 {
					t.Errorf("reader %d: status %d, %d bytes", i, status, len(b))
				}
			}
			m.in.Close()
			_ = m.proc.Wait(limit)
			if err := Unmount(m.dir); err != nil {
				t.Error(err)
			}
			if _, err := findMount(m.dir); !errors.Is(err, ErrNotMounted) {
				t.Errorf("%s is mounted still: %v", m.dir, err)
			}
			// The place can be used again.
			m.spec.Hold = false
			m.serve(nil)
			m.reader("mem", "pread", 0x400000, page.Size).mustRead(t, want(tagMem, 0x400, 1))
		})
	}
}

// A mount that somebody has unmounted lazily ends when it is closed, though a file of it is open
// and its mount point gone.
func TestCloseOfUnmounted(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs})
	f := m.open("mem")
	buf := make([]byte, page.Size)
	if err := exec.Command("umount", "-l", m.dir).Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(buf, 0x400000); err != nil {
		t.Errorf("unmounted lazily, and open: %v", err)
	}
	m.do("close")
	if _, err := f.ReadAt(buf, 0x7f0000000000); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("a read of a closed mount: %v", err)
	}
}

// A READ that go-fuse did not cancel, because it came while the mount was aborted, ends too.
func TestReadingOfDeadMount(t *testing.T) {
	const closed = 1 << 19 // a descriptor that is not open: poll(2) says POLLNVAL
	r := &reading{fs: &FS{device: closed, closing: make(chan struct{})}}
	select {
	case <-r.Done():
	case <-time.After(limit):
		t.Error("it waits on")
	}
	if r.Err() == nil {
		t.Error("no error")
	}
	r.end()
}
