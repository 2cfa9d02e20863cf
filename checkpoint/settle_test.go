package checkpoint

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// envTmpfs tells settlers in processes of their own where that is, which maps does not.
const envTmpfs = "PAGEFERRY_TEST_TMPFS"

// privateTmpfs makes a tmpfs whose device stands for that of a FUSE mount, and returns
// it. It is mounted nowhere: nothing is left of it, however the test ends.
func privateTmpfs(t testing.TB) (dir string, dev uint64) {
	t.Helper()
	open, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(open)
	if err := unix.FsconfigCreate(open); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Fsmount(open, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	dir = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	t.Setenv(envTmpfs, dir)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return dir, st.Dev
}

// veiled is the program of that name.
type veiled struct {
	*testutil.Process
	veil
	ino    uint64 // of the file behind its memory
	untrap func() // ends what trap began
}

// veil is what it has said of itself.
type veil struct {
	pid     int
	dev     uint64
	regions []veilRegion
	gone    page.Addr // of the bytes that tell what the program gave up
	pages   int       // of a region
}

type veilRegion struct {
	v, s   page.Addr
	offset uint64
	bytes  uint64
}

func startVeiled(t testing.TB, regions, pages, threads int, args ...string) *veiled {
	t.Helper()
	dir, dev := privateTmpfs(t)
	return runVeiled(t, dir, dev, []string{testutil.CC(t, "veiled")}, regions, pages, threads, args...)
}

func runVeiled(t testing.TB, dir string, dev uint64, cmd []string, regions, pages, threads int, args ...string) *veiled {
	t.Helper()
	cmd = append(cmd, filepath.Join(dir, "image"), fmt.Sprint(regions), fmt.Sprint(pages), fmt.Sprint(threads))
	p := testutil.StartCmd(t, exec.Command(cmd[0], append(cmd[1:], args...)...), 2*time.Minute)
	p.WaitText("ready\n", time.Minute)
	v := &veiled{Process: p}
	var err error
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "image"), &st); err != nil {
		t.Fatal(err)
	}
	v.ino = st.Ino
	if v.veil, err = parseVeil(p.Pid(), dev, p.Text()); err != nil {
		t.Fatal(err)
	}
	return v
}

func parseVeil(pid int, dev uint64, text string) (veil, error) {
	v := veil{pid: pid, dev: dev}
	for line := range strings.Lines(text) {
		var r veilRegion
		if n, _ := fmt.Sscanf(line, "region %x %x %x %x", &r.v, &r.s, &r.offset, &r.bytes); n == 4 {
			v.regions = append(v.regions, r)
		}
		_, _ = fmt.Sscanf(line, "gone %x", &v.gone)
	}
	if len(v.regions) == 0 || v.gone == 0 {
		return v, fmt.Errorf("not what the program says of itself: %s", text)
	}
	v.pages = int(v.regions[0].bytes / page.Size)
	return v, nil
}

// config settles it.
func (v *veil) config() SettleConfig {
	return SettleConfig{Dev: v.dev, Backing: v.backing, Stopped: v.stopped}
}

func (v *veil) backing(m proc.Mapping) Backing {
	for _, r := range v.regions {
		if m.Offset >= r.offset && m.Offset < r.offset+r.bytes {
			return Backing{Shadow: r.s + page.Addr(m.Offset-r.offset), Bytes: r.offset + r.bytes - m.Offset}
		}
	}
	return Backing{Later: true}
}

// stopped tells what the program gave up, as the reader of a userfaultfd would.
func (v *veil) stopped(_ context.Context, parts []SettlePart) (zeroed page.Set, err error) {
	m, err := proc.OpenMemory(v.pid)
	if err != nil {
		return zeroed, err
	}
	defer m.Close()
	for _, p := range parts {
		b := make([]byte, p.Pages())
		if err := m.ReadAt(b, v.gone+page.Addr(p.Offset/page.Size)); err != nil {
			return zeroed, err
		}
		for i, g := range b {
			if g != 0 {
				zeroed.Add(page.PageOf(p.Shadow + page.Addr(i*page.Size)))
			}
		}
	}
	return zeroed, nil
}

// settleAll settles all and sees that nothing is left of the device, nor of shadows.
func settleAll(t testing.TB, pid int, cfg SettleConfig, shadows ...page.Range) SettleReport {
	t.Helper()
	s, err := Open(pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := NewSettler(s, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rep, err := st.Settle(ctx, nil)
	if err == nil {
		err = st.Release(ctx, shadows)
	}
	if err == nil {
		err = st.Close()
	}
	if err != nil {
		t.Fatalf("%v\n%v", err, &rep)
	}
	left, err := st.Left()
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("%d mappings are left, the first is %+v", len(left), left[0])
	}
	maps, err := proc.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range shadows {
		for _, m := range maps {
			if m.Overlaps(s) {
				t.Errorf("in the place of shadow %v there is %+v", s, m)
			}
		}
	}
	for _, s := range rep.Skipped {
		t.Errorf("skipped %v: %v", s.Range, s.Why)
	}
	return rep
}

// finish has the program check everything, and what it gave up strictly.
func (v *veiled) finish(t testing.TB) {
	t.Helper()
	v.Signal(unix.SIGUSR1)
	time.Sleep(50 * time.Millisecond) // it works on, settled
	v.Signal(unix.SIGTERM)
	if err := v.Wait(30 * time.Second); err != nil || !strings.Contains(v.Text(), "ok ") {
		t.Fatalf("the program: %v\n%s", err, v.Text())
	}
	if v.untrap != nil {
		v.untrap()
	}
}

// Memory that a program writes, protects, gives up, moves, guards and forks all the
// time is replaced under it, and it finds nothing wrong.
func TestSettleWhileItChanges(t *testing.T) {
	for _, threads := range []int{1, 8, 64} {
		t.Run(fmt.Sprint(threads), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64)
			testutil.NoLeaks(t)
			v := startVeiled(t, max(8, threads), 16<<10/max(8, threads), threads)
			rep := settleAll(t, v.Pid(), v.config(), v.shadows()...)
			t.Log(&rep)
			v.finish(t)
		})
	}
}

// With many thousand mappings a stop is still short: none is read but those that are
// replaced.
func TestSettleManyMappings(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	v := startVeiled(t, 10000, 2, 4, "no-fork")
	rep := settleAll(t, v.Pid(), v.config(), v.shadows()...)
	t.Log(&rep)
	v.finish(t)
}
