package restore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxMemfdName is how long the name of a memfd may be: NAME_MAX without "memfd:".
const maxMemfdName = 249

// MakeExe makes a file in memory that can be the executable of a process whose own is
// not on this host: of size bytes, as read gives them, sealed, and called path, so that
// the next host can look whether it has it. read is asked for pieces in order.
func MakeExe(path string, size int64, read func(b []byte, at int64) error) (_ *os.File, err error) {
	name := path
	if len(name) > maxMemfdName {
		name = filepath.Base(path)
		name = name[:min(len(name), maxMemfdName)]
	}
	// Without the flag vm.memfd_noexec decides. Before Linux 6.3 there are neither, and
	// every memfd can be executed.
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_EXEC)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("restore: executable %s: %w", path, os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), "/memfd:"+name)
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore: executable %s: %w", path, errors.Join(err, f.Close()))
		}
	}()
	b := make([]byte, min(size, 1<<20))
	for at := int64(0); at < size; at += int64(len(b)) {
		b = b[:min(int64(len(b)), size-at)]
		if err := read(b, at); err != nil {
			return nil, err
		}
		if _, err := f.WriteAt(b, at); err != nil {
			return nil, err
		}
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return f, nil
}

// fetched is an executable that Config.Exe is asked for, while the process is built.
type fetched struct {
	cancel context.CancelFunc
	done   chan struct{}
	file   *os.File
	err    error
}

func (r *rebuild) fetchExe(i int) *fetched {
	ctx, cancel := context.WithCancel(r.ctx)
	f := &fetched{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		f.file, f.err = r.cfg.Exe(ctx, i)
	}()
	return f
}

// close waits for it to be over.
func (f *fetched) close() {
	if f == nil {
		return
	}
	f.cancel()
	<-f.done
	if f.file != nil {
		_ = f.file.Close()
	}
}

// exePath is what the executable is called.
func (r *rebuild) exePath() string {
	if i := r.p.ExeFile; i > 0 {
		return r.img.MappedFiles[i-1].Path
	}
	return r.p.Exe
}

// passExe hands the fetched executable to the process, and returns its number there,
// or -1 where there is none. The process need not see us in any /proc.
func (r *rebuild) passExe() (int, error) {
	if r.exe == nil {
		return -1, nil
	}
	<-r.exe.done
	if r.exe.err != nil {
		return -1, about(r.exe.err, "executable %s", r.exePath())
	}
	tid := r.target.pid
	s := newScript(r.target.t)
	s.onf("a way for the executable")
	ends := s.Space(8)
	s.call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0, ends.Addr())
	if err := s.run(tid); err != nil {
		return -1, err
	}
	ours, theirs := binary.LittleEndian.Uint32(ends.Bytes()), binary.LittleEndian.Uint32(ends.Bytes()[4:])
	link, err := unix.PidfdGetfd(r.pidfd, int(ours), 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(link)
	if err := unix.Sendmsg(link, []byte{0}, unix.UnixRights(int(r.exe.file.Fd())), nil, unix.MSG_DONTWAIT); err != nil {
		return -1, os.NewSyscallError("sendmsg", err)
	}
	s = newScript(r.target.t)
	s.onf("executable %s", r.exePath())
	control, data := s.Space(unix.CmsgSpace(4)), s.Space(8)
	iov := s.Bytes(le64(data.Addr(), 1))
	msg := s.Bytes(le64(0, 0, iov, 1, control.Addr(), uint64(unix.CmsgSpace(4)), 0)) // struct msghdr
	s.call(unix.SYS_RECVMSG, uint64(theirs), msg, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	s.call(unix.SYS_CLOSE, uint64(ours))
	s.call(unix.SYS_CLOSE, uint64(theirs))
	if err := s.run(tid); err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(control.Bytes())
	if err == nil && len(msgs) == 1 {
		var fds []int
		if fds, err = unix.ParseUnixRights(&msgs[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, about(fmt.Errorf("it did not arrive in the process: %w", errors.Join(err, unix.EPROTO)), "executable %s", r.exePath())
}
