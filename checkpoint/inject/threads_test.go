package inject

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Many threads make their calls at once, more of them than were counted when the
// area was made.
func TestRunAllThreads(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Threads: 200, Args: []string{"--only", "regs"}})
	tr := proc.NewTracer()
	defer tr.Close()
	tids, err := proc.Threads(p.Pid())
	if err != nil || len(tids) < 200 {
		t.Fatal(len(tids), err)
	}
	for _, tid := range tids {
		hold(t, tr, tid)
	}
	tg, err := Bootstrap(tr, p.Pid(), p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	tg.blocks = int(tg.code.Bytes()-page.Size)/blockSize - 50
	jobs := make([]Job, len(tids))
	calls := make([]*Call, len(tids))
	for i, tid := range tids {
		b := tg.Batch()
		calls[i] = b.Call(unix.SYS_GETTID)
		for range 10 {
			b.Call(unix.SYS_GETPID)
		}
		jobs[i] = Job{tid, b}
	}
	began := time.Now()
	if err := RunAll(jobs); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d threads, 11 calls each: %v", len(tids), time.Since(began))
	for i, tid := range tids {
		if v, err := calls[i].Ret(); err != nil || v != uint64(tid) {
			t.Errorf("thread %d says it is %d, %v", tid, v, err)
		}
	}
	if err := tg.Close(tids[len(tids)-1]); err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		letGo(t, tr, tid)
	}
	p.Verify()
}

// A batch can be as long as a big image asks for.
func TestLongBatch(t *testing.T) {
	tr, tg, pid := begin(t)
	const n = 5000
	b := tg.Batch()
	outs := make([]*Out, n)
	piece := make([]byte, 600)
	for i := range outs {
		outs[i] = b.Space(4)
		piece[0], piece[599] = byte(i), byte(i>>8)
		from := b.Bytes(piece)
		b.Call(unix.SYS_PREAD64, ^uint64(0), from, 1).Optional()
		b.Call(unix.SYS_GETPID).StoreAt32(outs[i].Addr())
	}
	if err := b.Run(pid); err != nil {
		t.Fatal(err)
	}
	for i, o := range outs {
		if got := int(o.Bytes()[0]) | int(o.Bytes()[1])<<8 | int(o.Bytes()[2])<<16; got != pid {
			t.Fatalf("result %d is %d", i, got)
		}
	}
	areas := len(tg.Areas())
	// What a finished batch took is used again.
	for range 20 {
		b := tg.Batch()
		b.Bytes(make([]byte, 1<<20))
		b.Call(unix.SYS_GETPID)
		if err := b.Run(pid); err != nil {
			t.Fatal(err)
		}
	}
	if now := len(tg.Areas()); now > areas+1 {
		t.Errorf("%d areas became %d", areas, now)
	}
	if err := tg.Close(pid); err != nil {
		t.Fatal(err)
	}
	letGo(t, tr, pid)
}

// Signals from outside during a batch are neither lost nor do they harm it.
func TestSignalsDuringABatch(t *testing.T) {
	tr, tg, pid := begin(t)
	for range 5 {
		b := tg.Batch()
		for range 20000 {
			b.Call(unix.SYS_GETPPID)
		}
		stop := make(chan struct{})
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			for {
				select {
				case <-stop:
					return
				default:
					_ = unix.Kill(pid, unix.SIGURG)
					_ = unix.Kill(pid, unix.SIGWINCH)
					_ = unix.Kill(pid, unix.SIGSTOP)
				}
			}
		}()
		err := b.Run(pid)
		close(stop)
		<-sent
		if err != nil {
			t.Fatal(err)
		}
	}
	if tg.Stopped() != unix.SIGSTOP {
		t.Errorf("the stop signal was lost: %v", tg.Stopped())
	}
	if err := tg.Close(pid); err != nil {
		t.Fatal(err)
	}
	letGo(t, tr, pid)
}

func TestKilledDuringABatch(t *testing.T) {
	_, tg, pid := begin(t)
	b := tg.Batch()
	ts := sys.Timespec{Sec: 100}
	b.Call(unix.SYS_NANOSLEEP, b.Bytes(sys.AsBytes(&ts)), 0)
	time.AfterFunc(20*time.Millisecond, func() { _ = unix.Kill(pid, unix.SIGKILL) })
	if err := b.Run(pid); !errors.Is(err, proc.ErrGone) {
		t.Errorf("run: %v", err)
	}
	if err := tg.Close(pid); !errors.Is(err, proc.ErrGone) {
		t.Errorf("close: %v", err)
	}
	if _, err := Bootstrap(tg.tr, pid, pid); !errors.Is(err, proc.ErrGone) {
		t.Errorf("bootstrap: %v", err)
	}
}

// The first process of a PID namespace cannot end before its children are reaped, and it is
// traced by the thread that traces them.
func TestFirstOfANamespaceKilledDuringABatch(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	pid := cmd.Process.Pid
	tr := proc.NewTracer()
	t.Cleanup(tr.Close)
	hold(t, tr, pid)
	tr.Do(func() {
		err := sys.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACEFORK|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL)
		if err != nil {
			t.Fatal(err)
		}
	})
	tg, err := Bootstrap(tr, pid, pid)
	if err != nil {
		t.Fatal(err)
	}
	b := tg.Batch()
	b.Call(unix.SYS_CLONE3, b.Bytes(sys.AsBytes(&sys.CloneArgs{ExitSignal: uint64(unix.SIGCHLD)})), uint64(sys.SizeOf[sys.CloneArgs]()))
	ts := sys.Timespec{Sec: 100}
	b.Call(unix.SYS_NANOSLEEP, b.Bytes(sys.AsBytes(&ts)), 0)
	ran := make(chan error, 1)
	go func() { ran <- b.Run(pid) }()
	time.AfterFunc(100*time.Millisecond, func() { _ = unix.Kill(pid, unix.SIGKILL) })
	select {
	case err := <-ran:
		if !errors.Is(err, proc.ErrGone) {
			t.Errorf("run: %v", err)
		}
	case <-time.After(10 * time.Second):
		for _, e := range children(pid) { // so that the thread can go on, and the test end
			_ = unix.Waitid(unix.P_PID, e, nil, unix.WEXITED|unix.WALL, nil)
		}
		t.Fatal("it waits for the end of a process that waits for it")
	}
}

// children lists those of pid.
func children(pid int) (out []int) {
	all, _ := os.ReadDir("/proc")
	for _, e := range all {
		if child, err := strconv.Atoi(e.Name()); err == nil {
			if st, err := proc.ReadStat(child); err == nil && st.PPID == pid {
				out = append(out, child)
			}
		}
	}
	return out
}

// An adopted process makes children in a batch; they arrive stopped.
func TestAdoptAndClone(t *testing.T) {
	tr, tg, pid := begin(t)
	b := tg.Batch()
	const size = 16 * page.Size
	at := b.Call(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uint64(0), 0)
	if err := b.Run(pid); err != nil {
		t.Fatal(err)
	}
	if err := tg.Close(pid); err != nil {
		t.Fatal(err)
	}
	start, _ := at.Ret()
	tr.Do(func() {
		err := sys.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACEFORK|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL)
		if err != nil {
			t.Fatal(err)
		}
	})
	tg, err := Adopt(tr, pid, page.Range{Start: page.Addr(start), End: page.Addr(start) + size})
	if err != nil {
		t.Fatal(err)
	}
	b = tg.Batch()
	first := b.Call(unix.SYS_CLONE3, b.Bytes(sys.AsBytes(&sys.CloneArgs{ExitSignal: uint64(unix.SIGCHLD)})), uint64(sys.SizeOf[sys.CloneArgs]()))
	second := b.Call(unix.SYS_CLONE3, b.Bytes(sys.AsBytes(&sys.CloneArgs{
		Flags: unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM,
	})), uint64(sys.SizeOf[sys.CloneArgs]()))
	last := b.Call(unix.SYS_GETPID)
	if err := b.Run(pid); err != nil {
		t.Fatal(err)
	}
	one, _ := first.Ret()
	two, _ := second.Ret()
	if c := b.Clones(); len(c) != 2 || uint64(c[0]) != one || uint64(c[1]) != two {
		t.Fatalf("clones %v, the calls returned %d and %d", c, one, two)
	}
	if v, err := last.Ret(); err != nil || v != uint64(pid) {
		t.Errorf("getpid after the clones: %d, %v", v, err)
	}
	// The new thread makes calls by the same target.
	b = tg.Batch()
	me := b.Call(unix.SYS_GETTID)
	if err := b.Run(int(two)); err != nil {
		t.Fatal(err)
	}
	if v, _ := me.Ret(); v != two {
		t.Errorf("the new thread says it is %d, not %d", v, two)
	}
	if err := tg.Close(pid); err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil || len(maps) == 0 {
		t.Fatal(err)
	}
	ms, _ := proc.ParseMaps(maps)
	for _, m := range ms {
		if m.Contains(page.Addr(start)) {
			t.Errorf("the stub area is still mapped: %v", m.Range)
		}
	}
	_ = unix.Kill(int(one), unix.SIGKILL)
}
