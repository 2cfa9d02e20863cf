package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

const pieceBytes = 1 << 20

// SaveOptions is how a checkpoint is taken. The zero value ends the process when
// the checkpoint is on the disk.
type SaveOptions struct {
	// LeaveRunning lets the process go on after the copy.
	LeaveRunning bool
	// TCPClose carries established connections as reset ones instead of
	// refusing the process.
	TCPClose bool
	Log      *slog.Logger // nil discards
}

// Summary says what Save wrote, in pages and bytes.
type Summary struct {
	Pages, PagesZero uint64
	BytesMemory      uint64
	BytesImage       uint64
}

// Save writes a checkpoint of pid to dir, which must not exist. Before it
// returns successfully everything is on the disk; on error dir is not there and
// the process runs on.
func Save(ctx context.Context, pid int, dir string, opt SaveOptions) (sum Summary, err error) {
	if _, err := os.Lstat(dir); err == nil {
		return sum, fmt.Errorf("store: %s exists: choose another directory", dir)
	}
	dir = filepath.Clean(dir)
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".*")
	if err != nil {
		return sum, fmt.Errorf("store: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
		}
	}()
	s, err := checkpoint.Open(pid, checkpoint.Options{TCPClose: opt.TCPClose, Log: opt.Log})
	if err != nil {
		return sum, err
	}
	defer s.Close()
	// Thaw is right in every state and does nothing after Kill.
	defer func() {
		if terr := s.Thaw(context.WithoutCancel(ctx)); terr != nil && !errors.Is(terr, os.ErrProcessDone) {
			err = errors.Join(err, fmt.Errorf("store: let process %d go on: %w", pid, terr))
		}
	}()
	if err := s.Isolate(ctx); err != nil {
		return sum, err
	}
	if err := s.Survey(); err != nil {
		return sum, err
	}
	if err := s.Freeze(ctx); err != nil {
		return sum, err
	}
	img, ms, err := s.Capture(ctx)
	if err != nil {
		return sum, err
	}
	if err := s.Hold(ctx); err != nil {
		return sum, err
	}
	if sum, err = write(ctx, tmp, img, ms, s.ReadPages); err != nil {
		return sum, fmt.Errorf("store: write checkpoint of process %d: %w", pid, err)
	}
	if err := os.Rename(tmp, dir); err != nil {
		return sum, fmt.Errorf("store: %w", err)
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		os.RemoveAll(dir)
		return sum, err
	}
	if !opt.LeaveRunning {
		return sum, s.Kill(ctx)
	}
	return sum, nil
}

// ReadPages copies the pages of rs into buf; see checkpoint.Session.ReadPages.
type readPages func(space page.Space, rs []page.Range, buf []byte) error

func write(ctx context.Context, dir string, img *image.Image, ms []image.Memory, read readPages) (sum Summary, err error) {
	b, err := image.Encode(img)
	if err != nil {
		return sum, err
	}
	sum.BytesImage = uint64(len(b))
	if err := writeFile(filepath.Join(dir, imageFile), b); err != nil {
		return sum, err
	}
	f, err := os.OpenFile(filepath.Join(dir, pagesFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	ex, total := extents(ms)
	sums := make([]uint32, total/page.Size)
	if err := f.Truncate(total); err != nil {
		return sum, err
	}
	zero, err := copyPages(ctx, f, ex, sums, read)
	if err != nil {
		return sum, err
	}
	if err := f.Sync(); err != nil {
		return sum, err
	}
	sum.BytesMemory, sum.Pages, sum.PagesZero = uint64(total), uint64(len(sums)), zero
	if err := writeFile(filepath.Join(dir, memoryFile), encodeMemory(ms, sums)); err != nil {
		return sum, err
	}
	return sum, syncDir(dir)
}

// copyPages writes the content of ex to f and notes each page's checksum. Zero
// pages stay holes.
func copyPages(ctx context.Context, f *os.File, ex []Extent, sums []uint32, read readPages) (zero uint64, err error) {
	g, ctx := errgroup.WithContext(ctx)
	work := make(chan Extent)
	var mu sync.Mutex
	for range min(4, runtime.GOMAXPROCS(0)) {
		g.Go(func() error {
			buf := make([]byte, pieceBytes)
			for e := range work {
				b := buf[:e.Bytes()]
				if err := read(e.Space, []page.Range{e.Range}, b); err != nil {
					return err
				}
				n, err := writePiece(f, e, b, sums)
				if err != nil {
					return err
				}
				mu.Lock()
				zero += n
				mu.Unlock()
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(work)
		for _, e := range ex {
			for e.Start < e.End {
				p := e
				p.End = min(e.End, e.Start+pieceBytes)
				select {
				case work <- p:
				case <-ctx.Done():
					return ctx.Err()
				}
				e.Offset += int64(p.Bytes())
				e.Start = p.End
			}
		}
		return nil
	})
	return zero, g.Wait()
}

var zeroPage [page.Size]byte

// writePiece writes b, the content of e, leaving out zero pages.
func writePiece(f *os.File, e Extent, b []byte, sums []uint32) (zero uint64, err error) {
	from := 0 // first byte not yet written
	flush := func(to int) {
		if err == nil && to > from {
			_, err = f.WriteAt(b[from:to], e.Offset+int64(from))
		}
	}
	for i := 0; i < len(b); i += page.Size {
		p := b[i : i+page.Size]
		sums[(e.Offset+int64(i))/page.Size] = crc32.Checksum(p, castagnoli)
		if bytes.Equal(p, zeroPage[:]) {
			flush(i)
			from = i + page.Size
			zero++
		}
	}
	flush(len(b))
	return zero, err
}

func writeFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
