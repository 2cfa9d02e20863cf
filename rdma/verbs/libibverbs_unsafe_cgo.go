//go:build cgo

package verbs

// #cgo LDFLAGS: -ldl
// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"fmt"
	"syscall"
	"unsafe"

	"github.com/pageferry/pageferry/internal/sys"
)

func load() (binding, error) {
	var why [256]C.char
	if errno := C.pf_load(&why[0], C.size_t(len(why))); errno != 0 {
		return nil, fmt.Errorf("%w: %s (apt-get install libibverbs1 ibverbs-providers)", ErrNoLibrary, C.GoString(&why[0]))
	}
	return libibverbs{}, nil
}

// libibverbs is the library once it is loaded.
type libibverbs struct{}

func (libibverbs) open(name string) (uintptr, uintptr, int, syscall.Errno) {
	s := C.CString(name)
	defer C.free(unsafe.Pointer(s))
	var ctx, pd C.uintptr_t
	var fd C.int
	errno := C.pf_open(s, &ctx, &pd, &fd)
	return uintptr(ctx), uintptr(pd), int(fd), syscall.Errno(errno)
}

func (libibverbs) close(ctx, pd uintptr) syscall.Errno {
	return syscall.Errno(C.pf_close(C.uintptr_t(ctx), C.uintptr_t(pd)))
}

func (libibverbs) kernel(ctx, pd uintptr) (int, uint32) {
	var fd C.int
	var handle C.uint32_t
	C.pf_kernel(C.uintptr_t(ctx), C.uintptr_t(pd), &fd, &handle)
	return int(fd), uint32(handle)
}

func (libibverbs) query(ctx uintptr, port, gidIndex int, l *Limits) syscall.Errno {
	return syscall.Errno(C.pf_query(C.uintptr_t(ctx), C.uint32_t(port), C.uint32_t(gidIndex), (*C.struct_pf_limits)(unsafe.Pointer(l))))
}

func (libibverbs) async(ctx uintptr) (Event, uintptr, syscall.Errno) {
	var e C.uint32_t
	var qp C.uintptr_t
	errno := C.pf_async(C.uintptr_t(ctx), &e, &qp)
	return Event(e), uintptr(qp), syscall.Errno(errno)
}

func (libibverbs) reg(pd uintptr, mem []byte, access uint32) (uintptr, uint32, uint32, syscall.Errno) {
	var mr C.uintptr_t
	var lkey, rkey C.uint32_t
	errno := C.pf_reg(C.uintptr_t(pd), C.uintptr_t(sys.Address(mem)), C.size_t(len(mem)), C.uint32_t(access), &mr, &lkey, &rkey)
	return uintptr(mr), uint32(lkey), uint32(rkey), syscall.Errno(errno)
}

func (libibverbs) dereg(mr uintptr) syscall.Errno {
	return syscall.Errno(C.pf_dereg(C.uintptr_t(mr)))
}

func (libibverbs) cqCreate(ctx uintptr, n int) (uintptr, uintptr, int, syscall.Errno) {
	var ch, cq C.uintptr_t
	var fd C.int
	errno := C.pf_cq_create(C.uintptr_t(ctx), C.uint32_t(n), &ch, &cq, &fd)
	return uintptr(ch), uintptr(cq), int(fd), syscall.Errno(errno)
}

func (libibverbs) cqDestroy(ch, cq uintptr) syscall.Errno {
	return syscall.Errno(C.pf_cq_destroy(C.uintptr_t(ch), C.uintptr_t(cq)))
}

func (libibverbs) cqArm(cq uintptr) syscall.Errno {
	return syscall.Errno(C.pf_cq_arm(C.uintptr_t(cq)))
}

func (libibverbs) cqEvents(ch uintptr) (int, syscall.Errno) {
	var n C.uint32_t
	errno := C.pf_cq_events(C.uintptr_t(ch), &n)
	return int(n), syscall.Errno(errno)
}

func (libibverbs) cqPoll(cq uintptr, c []Completion, ns uint32) int {
	return int(C.pf_cq_poll(C.uintptr_t(cq), (*C.struct_pf_wc)(unsafe.Pointer(unsafe.SliceData(c))), C.int(len(c)), C.uint32_t(ns)))
}

func (libibverbs) qpCreate(pd, cq uintptr, sends, recvs, port int) (uintptr, uint32, syscall.Errno) {
	var qp C.uintptr_t
	var qpn C.uint32_t
	errno := C.pf_qp_create(C.uintptr_t(pd), C.uintptr_t(cq), C.uint32_t(sends), C.uint32_t(recvs), C.uint32_t(port), &qp, &qpn)
	return uintptr(qp), uint32(qpn), syscall.Errno(errno)
}

func (libibverbs) qpConnect(qp uintptr, p *Peer) syscall.Errno {
	return syscall.Errno(C.pf_qp_connect(C.uintptr_t(qp), (*C.struct_pf_peer)(unsafe.Pointer(p))))
}

func (libibverbs) qpDestroy(qp uintptr) syscall.Errno {
	return syscall.Errno(C.pf_qp_destroy(C.uintptr_t(qp)))
}

func (libibverbs) postSend(qp uintptr, w []WorkRequest) (int, syscall.Errno) {
	var n C.int
	errno := C.pf_post_send(C.uintptr_t(qp), (*C.struct_pf_wr)(unsafe.Pointer(unsafe.SliceData(w))), C.int(len(w)), &n)
	return int(n), syscall.Errno(errno)
}

func (libibverbs) postRecv(qp uintptr, w []WorkRequest) (int, syscall.Errno) {
	var n C.int
	errno := C.pf_post_recv(C.uintptr_t(qp), (*C.struct_pf_wr)(unsafe.Pointer(unsafe.SliceData(w))), C.int(len(w)), &n)
	return int(n), syscall.Errno(errno)
}

func (libibverbs) status(s Status) string { return C.GoString(C.pf_status(C.uint32_t(s))) }
func (libibverbs) event(e Event) string   { return C.GoString(C.pf_event(C.uint32_t(e))) }

// The Go structs are the C ones.
var _ = [1]struct{}{}[unsafe.Sizeof(WorkRequest{})-C.sizeof_struct_pf_wr+
	unsafe.Sizeof(Completion{})-C.sizeof_struct_pf_wc+
	unsafe.Sizeof(Limits{})-C.sizeof_struct_pf_limits+
	unsafe.Sizeof(Peer{})-C.sizeof_struct_pf_peer]
