package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// bareFile is what go-fuse makes of memory without us: the yardstick.
type bareFile struct {
	gofs.Inode
	data shownMemory
}

func (f *bareFile) Getattr(_ context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Size, out.Mode = uint64(len(f.data)), 0o400
	return 0
}

func (f *bareFile) Open(context.Context, uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (f *bareFile) Read(_ context.Context, _ gofs.FileHandle, buf []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(buf[:copy(buf, f.data[off:])]), 0
}

type bareRoot struct {
	gofs.Inode
	file bareFile
}

func (r *bareRoot) OnAdd(ctx context.Context) {
	r.AddChild("mem", r.NewPersistentInode(ctx, &r.file, gofs.StableAttr{Mode: unix.S_IFREG, Ino: 2}), false)
}

// serveBare mounts go-fuse with the same options and the same read-ahead.
func (c *shownConfig) serveBare() error {
	m, err := newShownMemory(c.Size)
	if err != nil {
		return err
	}
	hour := time.Hour
	srv, err := gofs.Mount(c.Dir, &bareRoot{file: bareFile{data: m}}, &gofs.Options{AttrTimeout: &hour, EntryTimeout: &hour, MountOptions: fuse.MountOptions{
		DirectMountStrict: true, Name: "bare", FsName: "bare", MaxWrite: 1 << 20, MaxBackground: 64, DisableSplice: true, ExplicitDataCacheControl: true, DisableXAttrs: true}})
	if err != nil {
		return err
	}
	if err := bareReadAhead(c.Dir); err != nil {
		return errors.Join(err, srv.Unmount())
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	// srv.Unmount would wait as long as another mount namespace has a copy of the mount.
	return unix.Unmount(c.Dir, unix.MNT_FORCE)
}

// bareReadAhead raises the read-ahead of the mount on dir to fusemem's.
func bareReadAhead(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			return os.WriteFile("/sys/class/bdi/"+f[2]+"/read_ahead_kb", []byte("1024"), 0)
		}
	}
	return fmt.Errorf("nothing is mounted on %s", dir)
}
