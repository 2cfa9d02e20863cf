package fusemem

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// keep fetches the device's descriptor from the server, as a keeper has it.
func (m *mounted) keep() *os.File {
	m.Helper()
	pidfd, err := unix.PidfdOpen(m.proc.Pid(), 0)
	if err != nil {
		m.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, m.device, 0)
	if err != nil {
		m.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "device")
	m.Cleanup(func() { f.Close() })
	return f
}

// waiting waits until at least n READs wait for their Source.
func (m *mounted) waiting(n int) {
	m.Helper()
	testutil.Eventually(m, limit, func() error {
		if got, _ := strconv.Atoi(m.do("waiting")); got < n {
			return fmt.Errorf("%d READs wait, not %d", got, n)
		}
		return nil
	})
}

// Ten readers wait in a server that is killed, and get their bytes from another.
func TestTakeover(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Hold: true, Files: []fileSpec{{Path: "/lib/a.so", Size: 1 << 20}}})
	if m.device < FirstFD {
		t.Errorf("the device is descriptor %d", m.device)
	}
	m.do("takeover")
	device := m.keep()
	type job struct {
		*reader
		want []byte
	}
	var jobs []job
	for i := range uint64(4) {
		p := page.Num(0x7f0000000 + 0x100*i)
		jobs = append(jobs, job{m.reader("mem", "pread", uint64(p.Addr()), page.Size), want(tagMem, p, 1)})
		q := page.Num(i<<32 + i)
		jobs = append(jobs, job{m.reader("map/image", "mmaprandom", uint64(q.Addr()), page.Size), want(tagImage, q, 1)})
	}
	jobs = append(jobs,
		job{m.reader("map/0", "mmaprandom", 0, page.Size), want(tagFile, 0, 1)},
		job{m.reader("files/lib/a.so", "pread", 0x40000, page.Size), want(tagFile, 0x40, 1)})
	m.waiting(len(jobs))
	m.proc.Kill()
	for i, j := range jobs {
		if !j.Alive() {
			t.Errorf("reader %d did not wait", i)
		}
	}
	m.spec.Hold = false
	m.serve(device)
	for _, j := range jobs {
		j.mustRead(t, j.want)
	}
	// It serves what comes new as well, and ends as any other.
	m.reader("mem", "pread", 0x600000, page.Size).mustRead(t, want(tagMem, 0x600, 1))
	m.do("storefile %d %d 0", 0x80000, page.Size)
	m.do("close")
}

// Servers are killed one after the other while several processes read at random: none sees an error
// or a wrong byte.
func TestTakeoverUnderLoad(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	for _, procs := range []string{"1", "2"} {
		t.Run("GOMAXPROCS="+procs, func(t *testing.T) {
			testutil.NoLeaks(t)
			t.Setenv("GOMAXPROCS", procs)
			seed := rand.Int64()
			t.Logf("seed %d", seed)
			m := start(t, spec{VMAs: someVMAs, Image: true, Seed: uint64(seed), Delay: 200 * time.Microsecond,
				Files: []fileSpec{{Path: "/f", Size: 1024 * page.Size}}})
			device := m.keep()
			var all []*testutil.Process
			for i := range int64(3) {
				cmd := exec.Command("/proc/self/exe", m.dir, "stress", fmt.Sprint(seed+i), "600")
				cmd.Env = append(os.Environ(), envReader+"=1")
				all = append(all, testutil.StartCmd(t, cmd, 3*time.Minute))
			}
			r := rand.New(rand.NewPCG(uint64(seed), 2))
			for range 8 {
				time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
				m.proc.Kill()
				m.serve(device)
				if m.spec.High > 0 && m.device != m.spec.High || m.device < FirstFD {
					t.Errorf("the device is descriptor %d", m.device)
				}
				m.spec.High = 1007 - m.spec.High // now with a number to keep, now without
			}
			for _, p := range all {
				err := p.Wait(time.Minute)
				var good, bad int
				if _, e := fmt.Sscan(p.Text(), &good, &bad); err != nil || e != nil || bad > 0 {
					t.Errorf("a reader: %v: %s", err, p.Text())
				}
			}
			if n := m.do("waiting"); n != "0" {
				t.Errorf("%s READs are left", n)
			}
		})
	}
}

// A reader that was killed while nobody served is let go by who takes over.
func TestTakeoverAfterReaderKilled(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Hold: true})
	device := m.keep()
	before := m.reader("map/image", "mmaprandom", 0, page.Size)
	between := m.reader("map/image", "mmaprandom", 1<<30, page.Size)
	m.waiting(2)
	before.stuck(t)
	before.Signal(unix.SIGKILL) // the INTERRUPT goes to the server that dies, most likely
	m.proc.Kill()
	between.stuck(t)
	between.Signal(unix.SIGKILL)
	m.serve(device) // its Source gives nothing, either
	_ = before.Wait(limit)
	_ = between.Wait(limit)
}

func TestTakeoverRefused(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	null := func(cfg Config) Config { cfg.Memory = memory(nil); return cfg }
	m := start(t, spec{VMAs: someVMAs})
	device := m.keep()
	another := start(t, spec{VMAs: someVMAs})
	other, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for what, c := range map[string]struct {
		cfg Config
		fd  int
	}{
		"other mappings": {Config{Dir: m.dir, VMAs: someVMAs[1:]}, int(device.Fd())},
		"another place":  {Config{Dir: t.TempDir(), VMAs: someVMAs}, int(device.Fd())},
		"no device":      {Config{Dir: m.dir, VMAs: someVMAs}, int(other.Fd())},
		"another mount":  {Config{Dir: m.dir, VMAs: someVMAs}, int(another.keep().Fd())},
		"no descriptor":  {Config{Dir: m.dir, VMAs: someVMAs}, 999},
	} {
		if f, err := Takeover(null(c.cfg), c.fd); err == nil {
			_ = f.Close()
			t.Errorf("%s: taken over", what)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
	if _, err := Mount(null(Config{Dir: m.dir})); err == nil {
		t.Error("mounted twice")
	}
	if _, err := Mount(null(Config{Dir: m.dir + "/nowhere"})); err == nil {
		t.Error("mounted nowhere")
	}
	// The mount is as it was.
	m.reader("mem", "pread", 0x400000, page.Size).mustRead(t, want(tagMem, 0x400, 1))
}

func TestProbe(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	mount, takeOver := Probe()
	if mount != nil {
		t.Error(mount)
	}
	if takeOver != nil && !errors.Is(takeOver, sys.ErrNotSupported) {
		t.Error(takeOver)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "pageferry-probe-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
