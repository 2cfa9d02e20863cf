package fds

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// journalSocket takes what services print; systemd-journald makes it.
const journalSocket = "/run/systemd/journal/stdout"

func (e *examiner) sockDiag() (*sys.SockDiag, error) {
	if e.diag == nil {
		d, err := sys.OpenSockDiag()
		if err != nil {
			return nil, err
		}
		e.diag = d
	}
	return e.diag, nil
}

func (e *examiner) describeUnix(f *file, fd int) error {
	s := f.open.Socket
	f.what = addrString(s.Local)
	d, err := e.sockDiag()
	if err != nil {
		return err
	}
	u, err := d.Unix(f.inode)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			f.refuse("a unix socket of another network namespace")
			return nil
		}
		return err
	}
	f.peer = u.Peer
	s.Shutdown = u.Shutdown
	path, abstract := unixPath(s.Local)
	bound := path != "" || abstract
	switch {
	case u.State == tcpListen:
		s.State, f.state = image.SocketListening, "listening"
		s.Backlog = int(u.WQueue)
		s.Shutdown = 0
		if u.RQueue > 0 {
			f.note("%d connections that were not accepted yet are dropped", u.RQueue)
		}
	case u.Peer != 0:
		s.State, f.state = image.SocketConnected, "connected"
	case s.Type != unix.SOCK_DGRAM && (u.State == tcpEstablished || u.Shutdown != 0):
		s.State, f.state = image.SocketClosed, "peer gone"
		s.Shutdown = 3
	case s.Type == unix.SOCK_DGRAM && s.Remote != nil:
		s.State, f.state = image.SocketClosed, "peer gone"
	case bound:
		s.State, f.state = image.SocketBound, "bound"
	default:
		s.State, f.state = image.SocketFresh, "unbound"
	}
	if f.info.SCM > 0 {
		f.refuse("has %d descriptors in flight (SCM_RIGHTS)", f.info.SCM)
		return nil
	}
	if path != "" && !abstract && (s.State == image.SocketListening || s.State == image.SocketBound || s.Type == unix.SOCK_DGRAM) {
		e.boundPath(f, path, u.VFSInode)
	}
	if s.State == image.SocketListening || !e.content && s.Type == unix.SOCK_STREAM {
		return nil
	}
	return e.peekQueue(f, fd)
}

// boundPath finds the file that a unix socket's name is.
func (e *examiner) boundPath(f *file, path string, ino uint32) {
	s := f.open.Socket
	if !filepath.IsAbs(path) {
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", e.pid))
		if err != nil {
			f.refuse("its working directory cannot be read: %v", err)
			return
		}
		path = filepath.Join(cwd, path)
	}
	f.open.Path = path
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	if err != nil || uint32(st.Ino) != ino || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		// Nobody can reach it by that name any more; it keeps the name only.
		f.open.Deleted = true
		f.note("its path %s is gone or names something else", path)
		return
	}
	s.Mode, s.UID, s.GID = st.Mode, st.Uid, st.Gid
}

// peekQueue reads unread messages and leaves them where they are. For a socket
// with message boundaries the peek offset has to be moved from message to
// message and is put back.
func (e *examiner) peekQueue(f *file, fd int) error {
	s := f.open.Socket
	n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		return fmt.Errorf("size of its queue: %w", err)
	}
	creds, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED)
	if err != nil {
		return fmt.Errorf("read SO_PASSCRED: %w", err)
	}
	// Room for credentials and no more: descriptors in flight then show as a
	// truncated control message instead of being installed here.
	var control []byte
	if creds != 0 {
		control = make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	}
	if s.Type == unix.SOCK_STREAM {
		if n == 0 {
			return nil
		}
		buf := make([]byte, n)
		k, _, flags, _, err := unix.Recvmsg(fd, buf, control, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("peek: %w", err)
		}
		switch {
		case flags&unix.MSG_CTRUNC != 0 && creds == 0:
			f.refuse("has descriptors in flight (SCM_RIGHTS)")
		case k != n || flags&unix.MSG_CTRUNC != 0:
			f.refuse("has %d unread bytes with control messages, which cannot be carried", n)
		}
		s.Queue = [][]byte{buf[:k]}
		return nil
	}
	if !e.content {
		return nil
	}
	old, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err != nil {
		return fmt.Errorf("read SO_PEEK_OFF: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0); err != nil {
		return fmt.Errorf("set SO_PEEK_OFF: %w", err)
	}
	defer unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, old)
	buf := make([]byte, 256<<10)
	for {
		k, _, flags, from, err := unix.Recvmsg(fd, buf, control, unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ECONNRESET) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("peek: %w", err)
		}
		if k == 0 {
			if s.Type == unix.SOCK_SEQPACKET {
				return nil // end of file; an empty message cannot be told from it
			}
			f.refuse("has an empty datagram unread")
			return nil
		}
		switch {
		case k > len(buf):
			f.refuse("has a message of %d bytes unread", k)
			return nil
		case flags&unix.MSG_CTRUNC != 0:
			f.refuse("has messages unread that carry descriptors (SCM_RIGHTS)")
			return nil
		}
		if a, ok := from.(*unix.SockaddrUnix); ok && a.Name != "" {
			f.refuse("has messages unread from %s, whose sender would be lost", strings.ToValidUTF8(a.Name, "?"))
			return nil
		}
		s.Queue = append(s.Queue, bytes.Clone(buf[:k]))
	}
}

// finishSockets finds the other ends of unix sockets, when all are known.
func (e *examiner) finishSockets() {
	at := make(map[uint32]int)
	for i, f := range e.files {
		if f.inode != 0 {
			at[f.inode] = i
		}
	}
	for _, f := range e.files {
		s := f.open.Socket
		if s == nil || s.Family != unix.AF_UNIX || s.State != image.SocketConnected {
			continue
		}
		if i, ok := at[f.peer]; ok {
			s.Peer = e.fileBase + i
			f.what = fmt.Sprintf("%s pair with descriptor %d", sockTypes[s.Type], e.files[i].nums[0])
			continue
		}
		to := addrString(s.Remote)
		f.what = strings.TrimSpace(f.what + " - " + to)
		path, abstract := unixPath(s.Remote)
		switch {
		case s.Type == unix.SOCK_DGRAM && (path != "" || abstract):
			f.note("is connected to %s there", to)
		case s.Type == unix.SOCK_STREAM && path == journalSocket && !abstract && len(s.Queue) == 0:
			f.note("is connected to the journal there")
		default:
			who := e.ownerOf(f.peer)
			f.refuse("is connected to a socket outside of the process%s", who)
		}
	}
}

var sockTypes = map[int]string{unix.SOCK_STREAM: "stream", unix.SOCK_DGRAM: "datagram", unix.SOCK_SEQPACKET: "seqpacket"}

// ownerOf names the process that holds a socket, for a refusal.
func (e *examiner) ownerOf(inode uint32) string {
	d, err := e.sockDiag()
	if err != nil {
		return ""
	}
	if u, err := d.Unix(inode); err == nil && len(u.Name) > 0 {
		return " (" + addrString(append([]byte{unix.AF_UNIX, 0}, u.Name...)) + ")"
	}
	return ""
}
