package fusemem

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// go-fuse has its buffers where touchBuffers looks for them, and gets none that is not there.
func TestBuffersAreThere(t *testing.T) {
	s := new(fuse.Server)
	p := readPool(s)
	if p == nil {
		t.Fatal("go-fuse has its buffers for requests elsewhere: a program gets SIGBUS where its pager is killed")
	}
	m, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	p.New = func() any { return m }
	if !touchBuffers(s) {
		t.Fatal("not touched")
	}
	b := p.Get().([]byte)
	for i := range 4 {
		if b[i*unix.Getpagesize()] == 0 {
			t.Errorf("page %d of a buffer was not touched", i)
		}
	}
}
