package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Where the files of a process are in the end that were mapped from its source: at their
// paths, if this host has got them meanwhile, in copies that it keeps, if it is to, or
// nowhere.

// fileOf is f as the pager is told of it.
func fileOf(f *image.MappedFile) pager.ShowFile {
	return pager.ShowFile{Path: f.Path, Size: f.File.Size, ModTime: time.Unix(0, f.File.MTimeNS), Mode: os.FileMode(f.File.Mode & 0o777),
		BuildID: f.File.BuildID, Hash: f.File.Hash, Deleted: f.Deleted}
}

// idOf is by what a file of f's content is known.
func idOf(f pager.ShowFile) image.FileID {
	return image.FileID{Size: f.Size, MTimeNS: f.ModTime.UnixNano(), BuildID: f.BuildID, Hash: f.Hash}
}

// kept is the copy of f that this host has for processes of user uid. ok: it has one.
func (h *host) kept(uid uint32, f pager.ShowFile) (path string, ok bool) {
	if h.opts.FilesDir == "" {
		return "", false
	}
	path = fileid.Keep(h.opts.FilesDir, uid, f.Path, idOf(f))
	var st unix.Stat_t
	return path, unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG &&
		st.Uid == uid && st.Size == f.Size && st.Mtim.Nano() == f.ModTime.UnixNano()
}

// read reads a part of file i of the source.
func (s *settling) read(ctx context.Context, i int, offset int64, buf []byte) error {
	err := s.retry(ctx, func(p *pager.Client) error { return p.Read(ctx, i, offset, buf) })
	if errors.Is(err, stream.ErrGone) {
		s.lost = err
	}
	return err
}

// pathKey is a file of a process: one that it has forked may be another user's.
type pathKey struct{ pid, file int }

// path is where this host has file i, for process pid; "" if it has not.
func (s *settling) path(ctx context.Context, pid, i int) string {
	key := pathKey{pid, i}
	if path, ok := s.paths[key]; ok {
		return path
	}
	f := &s.show.Files[i]
	path := ""
	if !f.Deleted && restore.SameFile(f.Path, idOf(*f)) == nil {
		path = f.Path
	} else if s.host.opts.FilesDir != "" {
		var err error
		if path, err = s.keep(ctx, pid, i); err != nil {
			s.log.Warn("no copy of a file is kept; the process gets private memory instead", "file", f.Path, "err", err)
		}
	}
	s.paths[key] = path
	return path
}

// keepingPrefix is what copies are called, before the id of the migration, that are not
// complete yet.
const keepingPrefix = ".keeping-"

// user is whose copies a process has with such user ids. One that has more than one user
// has no copies: what one of them could make of a file the other would get.
func user(uids [4]uint32) (uid uint32, ok bool) {
	return uids[0], uids == [4]uint32{uids[0], uids[0], uids[0], uids[0]}
}

// keep makes the copy of file i for the user of process pid.
func (s *settling) keep(ctx context.Context, pid, i int) (_ string, err error) {
	f := s.show.Files[i]
	st, err := proc.ReadStatus(pid) // not by the owner of /proc/PID: that is root where it cannot be dumped
	if err != nil {
		return "", err
	}
	uid, ok := user(st.UID)
	if !ok {
		return "", fmt.Errorf("process %d has the users %v", pid, st.UID)
	}
	path, ok := s.host.kept(uid, f)
	if ok {
		return path, nil
	}
	dir := s.host.opts.FilesDir
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if free := fs.Bavail * uint64(fs.Bsize); uint64(f.Size) > free {
		return "", fmt.Errorf("it has %s, and in %s are %s free: %w", mib(uint64(f.Size)), dir, mib(free), unix.ENOSPC)
	}
	tmp := filepath.Join(dir, fmt.Sprint(keepingPrefix, s.id, "-", i))
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			_ = os.Remove(tmp)
		}
	}()
	const most = 1 << 20
	buf := make([]byte, min(most, int64(page.Addr(f.Size).Ceil())))
	for at := int64(0); at < f.Size; at += most {
		b := buf[:min(most, int64(page.Addr(f.Size-at).Ceil()))]
		if err := s.read(ctx, i, at, b); err != nil {
			return "", err
		}
		if _, err := out.WriteAt(b[:min(most, f.Size-at)], at); err != nil {
			return "", err
		}
	}
	if err := errors.Join(out.Chown(int(uid), int(st.GID[0])), out.Chmod(f.Mode&0o100|0o400), os.Chtimes(tmp, f.ModTime, f.ModTime), out.Sync()); err != nil {
		return "", err
	}
	if f.Hash != "" {
		if sum, err := fileid.Hash(tmp); err != nil || sum != f.Hash {
			return "", fmt.Errorf("what came has SHA-256 %s, not %s: %w", sum, f.Hash, errors.Join(err, restore.ErrFileDiffers))
		}
	} else if id := fileid.BuildID(tmp); id != f.BuildID {
		return "", fmt.Errorf("what came has build id %q, not %q: %w", id, f.BuildID, restore.ErrFileDiffers)
	}
	return path, os.Rename(tmp, path)
}

// keepNothing removes what of copies is incomplete.
func (a *arrival) keepNothing() {
	if dir := a.host.opts.FilesDir; dir != "" {
		left, _ := filepath.Glob(filepath.Join(dir, keepingPrefix+a.id.String()+"-*"))
		for _, f := range left {
			_ = os.Remove(f)
		}
	}
}
