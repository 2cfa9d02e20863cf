package fusemem

import (
	"reflect"
	"sync"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/page"
)

// touchBuffers sees to it that go-fuse's buffers for requests are memory that is there. A thread
// of a server that is being killed may still be handed a request. If its buffer was never touched
// the kernel cannot get that page (get_user_pages gives up where a fatal signal is pending) and
// ends the request with EIO (fs/fuse/dev.c, fuse_dev_do_read), so a program that has the file
// mapped gets SIGBUS; if it was, the request is one that was read and not answered, and is sent
// again to whoever takes over.
//
// go-fuse has no option for that. It reports whether the buffers are where they are known to be.
func touchBuffers(s *fuse.Server) bool {
	pool := readPool(s)
	if pool == nil || pool.New == nil {
		return false
	}
	fresh := pool.New
	pool.New = func() any {
		b := fresh()
		if buf, ok := b.([]byte); ok {
			for i := 0; i < min(len(buf), 16<<10); i += page.Size {
				buf[i] = 1
			}
		}
		return b
	}
	return true
}

// readPool is where s has its buffers for requests from, nil if that is not known.
func readPool(s *fuse.Server) *sync.Pool {
	f := reflect.ValueOf(s).Elem().FieldByName("readPool")
	if !f.IsValid() || f.Type() != reflect.TypeFor[sync.Pool]() {
		return nil
	}
	return (*sync.Pool)(unsafe.Pointer(f.UnsafeAddr()))
}
