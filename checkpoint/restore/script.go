package restore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
)

// script is a batch of injected calls that remembers what each call is about, so
// that the one that fails can be named without naming the thousand that do not.
type script struct {
	*inject.Batch
	t      *inject.Target
	object func() string   // of the calls that come now
	names  []func() string // by index of the call
	failed error           // of a part that was run
}

func newScript(t *inject.Target) *script { return &script{Batch: t.Batch(), t: t} }

// partBytes is how large a part of a script is, in the stub area. What does not
// fit there the kernel would put anywhere, also where the process is going to have
// a mapping itself: with more than vm.max_map_count by default allows, or with as
// many guards, a single batch would be as large.
var partBytes = areaBytes / 8

// part runs what there is on the thread, if it is much. Then calls that come later
// must refer to none before. If it fails, run says so, and nothing more is made.
func (s *script) part(tid int) {
	if s.Size() < partBytes {
		return
	}
	if s.failed == nil {
		s.failed = s.run(tid)
	} else {
		s.Discard()
	}
	s.Batch, s.names = s.t.Batch(), nil
}

// on says what the next calls are about; nil is nothing worth naming.
func (s *script) on(object func() string) { s.object = object }

// onf is on for few calls, where the cost of a name does not matter.
func (s *script) onf(format string, a ...any) {
	s.object = func() string { return fmt.Sprintf(format, a...) }
}

func (s *script) call(nr uintptr, args ...uint64) *inject.Call {
	s.names = append(s.names, s.object)
	return s.Call(nr, args...)
}

// run runs the batch on the thread. One without calls is given up: as long as
// some batch is, none of the memory that they all take is used again.
func (s *script) run(tid int) error {
	if s.failed != nil {
		s.Discard()
		return s.failed
	}
	if len(s.names) == 0 {
		s.Discard()
		return nil
	}
	return s.explain(s.Batch.Run(tid))
}

// explain adds the object to the error of a call of this batch.
func (s *script) explain(err error) error {
	var ce *inject.CallError
	if errors.As(err, &ce) && ce.Index >= 0 && ce.Index < len(s.names) && s.names[ce.Index] != nil {
		return about(err, "%s", s.names[ce.Index]())
	}
	return err
}

// put places a kernel struct in the target's memory and returns its address.
func put[T any](s *script, v *T) uint64 { return s.Bytes(sys.AsBytes(v)) }

// runAll runs one batch per thread, all threads at the same time.
func runAll(tids []int, scripts []*script) error {
	jobs := make([]inject.Job, 0, len(scripts))
	for i, s := range scripts {
		if len(s.names) > 0 {
			jobs = append(jobs, inject.Job{TID: tids[i], Batch: s.Batch})
		} else {
			s.Discard()
		}
	}
	err := inject.RunAll(jobs)
	var ce *inject.CallError
	if errors.As(err, &ce) {
		for i, tid := range tids {
			if tid == ce.TID {
				return scripts[i].explain(err)
			}
		}
	}
	return err
}

func le64(vs ...uint64) []byte {
	b := make([]byte, 0, 8*len(vs))
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

// minus is a negative argument in a register.
func minus(v int64) uint64 { return uint64(-v) }

// atFDCWD is AT_FDCWD in a register.
const atFDCWD = ^uint64(0) - 99
