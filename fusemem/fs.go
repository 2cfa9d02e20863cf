package fusemem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

var (
	// ErrClosed is what calls return after Close, or after the mount was ended by somebody else.
	ErrClosed = errors.New("fusemem: the mount is closed")
	// ErrGone is what Run returns when the mount was ended, but not by Close.
	ErrGone = errors.New("fusemem: the mount was ended from outside (umount -f, or its connection aborted)")
)

// FS is a mount. Its methods may be called from any goroutine.
type FS struct {
	cfg       Config
	layout    *layout
	server    *fuse.Server
	device    int // the descriptor that others keep
	dev       uint32
	reads     reads
	snapshots snapshots
	stats     stats

	serving atomic.Bool
	closing chan struct{} // closed by Close, before anything else
	served  chan struct{} // closed when no request is under way any more
	once    sync.Once
	err     error // of Close
}

type stats struct {
	reads, bytes, failed, interrupted atomic.Uint64
}

// Stats is what was read through the mount so far.
type Stats struct {
	Reads       uint64 // READs that were answered with pages
	Bytes       uint64 // in them
	Failed      uint64 // READs answered with EIO by a Source
	Interrupted uint64 // READs given up, mostly because the reader was killed
	Waiting     int    // READs that wait for their Source now
}

// Stats returns a snapshot.
func (f *FS) Stats() Stats {
	f.reads.mu.Lock()
	waiting := len(f.reads.m)
	f.reads.mu.Unlock()
	return Stats{f.stats.reads.Load(), f.stats.bytes.Load(), f.stats.failed.Load(), f.stats.interrupted.Load(), waiting}
}

func newFS(cfg Config) (*FS, error) {
	if err := cfg.prepare(); err != nil {
		return nil, err
	}
	f := &FS{cfg: cfg, device: -1, closing: make(chan struct{}), served: make(chan struct{})}
	f.layout = newLayout(&f.cfg)
	return f, nil
}

// options are go-fuse's. The mount itself is made by us.
func (f *FS) options() *fuse.MountOptions {
	return &fuse.MountOptions{
		Name:                     fsName,
		FsName:                   f.source(),
		MaxWrite:                 maxRequest,
		MaxBackground:            64, // READs of read-ahead under way, with a buffer each
		DisableXAttrs:            true,
		DisableSplice:            true,
		ExplicitDataCacheControl: true,
		ExtraCapabilities:        fuse.CAP_HAS_RESEND,
		Logger:                   slog.NewLogLogger(f.cfg.Log.Handler(), slog.LevelDebug),
		PanicHandler: func(v any) fuse.Status {
			f.cfg.Log.Error("a request of the mount panicked", "panic", v, "stack", string(debug.Stack()))
			return fuse.EIO
		},
	}
}

func (f *FS) raw() *raw { return &raw{fuse.NewDefaultRawFileSystem(), f} }

// Run answers requests until Close is called, ctx ends, which closes it, or somebody ends the
// mount, which is ErrGone. It may be called once.
func (f *FS) Run(ctx context.Context) error {
	if !f.serving.CompareAndSwap(false, true) {
		return ErrClosed
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	f.server.Serve()
	close(f.served)
	if !isClosed(f.closing) {
		return ErrGone
	}
	return f.Close()
}

// Close unmounts, whoever still has files of it open or mapped (their accesses fail from then on),
// and returns when no request is under way any more. The second call waits for the first and
// returns the same.
func (f *FS) Close() error {
	f.once.Do(func() {
		close(f.closing)
		// What is under way is answered with an error, and then the kernel lets nobody wait: an
		// unmount would wait for locked pages.
		var err error
		if m, e := findMount(f.cfg.Dir); e == nil && m.minor == f.dev {
			err = Unmount(f.cfg.Dir)
		}
		if !f.aborted() {
			// Unmounted lazily by somebody else, and still in use.
			err = errors.Join(err, abort(f.dev))
		}
		if f.serving.CompareAndSwap(false, true) {
			f.server.Serve() // returns at once, and closes its descriptor
			close(f.served)
		}
		<-f.served
		if e := unix.Close(f.device); e != nil {
			err = errors.Join(err, fmt.Errorf("fusemem: close of the device: %w", e))
		}
		f.err = err
	})
	return f.err
}

// aborted reports whether the kernel has ended the connection (fs/fuse/dev.c, fuse_dev_poll).
func (f *FS) aborted() bool {
	p := []unix.PollFd{{Fd: int32(f.device)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// DeviceFD is the descriptor to keep so that Takeover can have it: at least FirstFD, close-on-exec,
// valid until Close.
func (f *FS) DeviceFD() int { return f.device }

// MemPath, ImagePath and FilePath are where mem, the image and the file with index i of
// Config.Files lie, the latter two for the process to map.
func (f *FS) MemPath() string { return filepath.Join(f.cfg.Dir, "mem") }

// ImagePath: see MemPath.
func (f *FS) ImagePath() string { return filepath.Join(f.cfg.Dir, "map", "image") }

// FilePath: see MemPath.
func (f *FS) FilePath(i int) string { return filepath.Join(f.cfg.Dir, "map", strconv.Itoa(i)) }

// ImagePath and FilePath are where a mount on dir has them.
func ImagePath(dir string) string       { return filepath.Join(dir, "map", "image") }
func FilePath(dir string, i int) string { return filepath.Join(dir, "map", strconv.Itoa(i)) }

// ImageID is the device and the inode that the image has in /proc/PID/maps.
func (f *FS) ImageID() (dev, ino uint64) { return unix.Mkdev(0, f.dev), nodeImage }
