package inject

import (
	"errors"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

type Target struct{}

func Bootstrap(tr *proc.Tracer, pid, tid int) (*Target, error) { return nil, errNotYet }

func Adopt(tr *proc.Tracer, pid int, area page.Range) (*Target, error) { return nil, errNotYet }

// Area is the address range that the stub and its arena take.
func (t *Target) Areas() []page.Range { return nil }

// UseSignal sets the signal that ends a batch.
func (t *Target) UseSignal(sig int) {}

// Release gives thread tid its registers and mask back; it stays stopped.
func (t *Target) Release(tid int) error { return errNotYet }

func (t *Target) Close(tid int) error { return errNotYet }

func (t *Target) Batch() *Batch { return nil }

type Batch struct{}

type Call struct{}

type Out struct{}

func (o *Out) Addr() uint64  { return 0 }
func (o *Out) Bytes() []byte { return nil }

func (b *Batch) Call(nr uintptr, args ...uint64) *Call { return nil }

// Arg makes argument i the result of an earlier call of this batch.
func (c *Call) Arg(i int, from *Call) *Call { return c }

// ArgAt32 makes argument i the 32-bit value that stands at addr when the call is
// made, for what earlier calls wrote there (pipe2, socketpair). ArgAt64 likewise.
func (c *Call) ArgAt32(i int, addr uint64) *Call { return c }
func (c *Call) ArgAt64(i int, addr uint64) *Call { return c }

// StoreAt also stores the result (64 bits) at addr, StoreAt32 its low 32 bits.
func (c *Call) StoreAt(addr uint64) *Call   { return c }
func (c *Call) StoreAt32(addr uint64) *Call { return c }

func (c *Call) Optional() *Call { return c }

func (c *Call) Ret() (uint64, error) { return 0, errNotYet }

func (b *Batch) Bytes(p []byte) uint64  { return 0 }
func (b *Batch) String(s string) uint64 { return 0 }
func (b *Batch) Space(n int) *Out       { return nil }
func (b *Batch) Clones() []int          { return nil }
func (b *Batch) Run(tid int) error      { return errNotYet }

type Job struct {
	TID   int
	Batch *Batch
}

func RunAll(jobs []Job) error { return errNotYet }

// CallError says which call of a batch failed.
type CallError struct {
	PID, TID int
	Index    int // of the call in its batch
	Nr       uintptr
	Name     string
	Err      error
}

func (e *CallError) Error() string { return e.Name }
func (e *CallError) Unwrap() error { return e.Err }

// KillPoint, when set by a test, is called with the name of each point at which
// a tracer might die. Nil in production.
var KillPoint func(point string)

var errNotYet = errors.New("inject: signatures only")
