package proc

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone says that the process or thread has ended.
var ErrGone = errors.New("process is gone")

// Tracer is one OS thread that attaches to processes. The kernel accepts ptrace
// requests about a tracee from no other thread.
type Tracer struct {
	work chan func()
	tid  int
	done chan struct{}
	once sync.Once
}

// NewTracer starts the thread.
func NewTracer() *Tracer {
	t := &Tracer{work: make(chan func()), done: make(chan struct{})}
	ready := make(chan struct{})
	go t.loop(ready)
	<-ready
	return t
}

func (t *Tracer) loop(ready chan struct{}) {
	// Never unlocked: when the goroutine returns the thread ends, and with it
	// every attachment it had.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The runtime cannot end the program's first thread, which would keep
		// its tracees for ever. Sit on it until another one has begun.
		go t.loop(ready)
		<-ready
		runtime.UnlockOSThread()
		return
	}
	t.tid = unix.Gettid()
	// A traced program stands still between two requests, and on a busy host
	// would do so for a time slice each time. Without the right to, it does.
	_ = unix.Setpriority(unix.PRIO_PROCESS, t.tid, -20)
	// It waits for stops in steps of 10 us, which by default become 60.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1000, 0, 0, 0)
	close(ready)
	defer close(t.done)
	for f := range t.work {
		f()
	}
}

// Do runs f on the thread and returns when it has returned. Called on the thread
// itself it just runs f, so Do may be nested. It must not be called after Close.
func (t *Tracer) Do(f func()) {
	if unix.Gettid() == t.tid {
		f()
		return
	}
	done := make(chan struct{})
	t.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Close ends the thread. Tracees that were not detached run on, and do so when
// it returns. It must not be called on the thread, nor while a Do runs.
// Idempotent.
func (t *Tracer) Close() {
	t.once.Do(func() {
		close(t.work)
		<-t.done
		// The goroutine has ended; its thread is about to. There is nothing to
		// wait on, and it takes microseconds.
		for end := time.Now().Add(time.Second); unix.Tgkill(os.Getpid(), t.tid, 0) == nil && time.Now().Before(end); {
			time.Sleep(20 * time.Microsecond)
		}
	})
}
