package fds

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
)

// synthetic is an image whose process has file i at descriptor i.
func synthetic(files ...image.OpenFile) *image.Image {
	img := &image.Image{Processes: make([]image.Process, 1), Files: files}
	for i := range files {
		img.Processes[0].FDs = append(img.Processes[0].FDs, image.FD{Num: i, File: i})
	}
	return img
}

// duplicate takes descriptor n of a process.
func duplicate(t testing.TB, pid, n int) int {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		t.Fatalf("descriptor %d: %v", n, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func inet4(a, b, c, d byte, port int) []byte {
	return []byte{unix.AF_INET, 0, byte(port >> 8), byte(port), a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0}
}

func listener(local []byte) image.OpenFile {
	return image.OpenFile{Kind: image.FileSocket, Flags: unix.O_RDWR, Socket: &image.Socket{
		Family: familyOf(local), Type: unix.SOCK_STREAM, Protocol: unix.IPPROTO_TCP,
		State: image.SocketListening, Local: local, Backlog: 9, Peer: -1,
	}}
}

func unixListener(t testing.TB, path string) image.OpenFile {
	t.Helper()
	local, err := unixAddr(path)
	if err != nil {
		t.Fatal(err)
	}
	return image.OpenFile{Kind: image.FileSocket, Flags: unix.O_RDWR, Path: path, Socket: &image.Socket{
		Family: unix.AF_UNIX, Type: unix.SOCK_STREAM, State: image.SocketListening, Local: local,
		Backlog: 9, Peer: -1, Mode: unix.S_IFSOCK | 0o600, UID: 65534, GID: 65534,
	}}
}

// TestRestoreErrors gives tables that this host cannot have. Each must say why,
// and leave nothing behind.
func TestRestoreErrors(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	p := startTable(t, "wait", dir)
	short := filepath.Join(dir, "short")
	locked := filepath.Join(dir, "locked")
	for _, f := range []string{short, locked} {
		if err := os.WriteFile(f, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := os.Open(locked)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	living := filepath.Join(dir, "living")
	ul, err := net.Listen("unix", living)
	if err != nil {
		t.Fatal(err)
	}
	defer ul.Close()
	made := filepath.Join(dir, "made")
	regular := image.FileID{Mode: unix.S_IFREG | 0o600, Size: 1}
	for _, c := range []struct {
		name string
		file image.OpenFile
		want string
	}{
		{"missing", image.OpenFile{Kind: image.FileRegular, Path: dir + "/none", ID: regular}, "does not exist on this host"},
		{"another size", image.OpenFile{Kind: image.FileRegular, Path: short, ID: image.FileID{Mode: unix.S_IFREG, Size: 5}}, "1 bytes on this host and 5"},
		{"another kind", image.OpenFile{Kind: image.FileRegular, Path: dir, ID: regular}, "another kind"},
		{"address", listener(inet4(192, 0, 2, 77, 4000)), "--address old=new"},
		{"port", listener(inet4(127, 0, 0, 1, busy.Addr().(*net.TCPAddr).Port)), "another socket of this host has it"},
		{"living socket", unixListener(t, living), "a living socket of this host"},
		{"not a socket", unixListener(t, short), "is not a socket"},
		{"lock", image.OpenFile{Kind: image.FileRegular, Flags: unix.O_RDWR, Path: locked, ID: regular,
			Locks: []image.Lock{{Kind: "FLOCK", Write: true}}}, "held by another"},
		{"device", image.OpenFile{Kind: image.FileDevice, Rdev: unix.Mkdev(10, 229)}, "cannot be carried"},
		{"option", image.OpenFile{Kind: image.FileSocket, Socket: &image.Socket{Family: unix.AF_INET, Type: unix.SOCK_DGRAM,
			State: image.SocketFresh, Peer: -1, Options: []image.SockOpt{{Level: 0, Name: 35, Value: make([]byte, 8)}}}}, "not one that an image may have"},
		{"family", image.OpenFile{Kind: image.FileSocket, Socket: &image.Socket{Family: unix.AF_PACKET, Type: unix.SOCK_RAW,
			State: image.SocketFresh, Peer: -1}}, "cannot be carried"},
		{"half a pair", image.OpenFile{Kind: image.FileSocket, Socket: &image.Socket{Family: unix.AF_UNIX, Type: unix.SOCK_STREAM,
			State: image.SocketConnected, Peer: 0}}, "does not know it"},
		{"watch", image.OpenFile{Kind: image.FileInotify, Inotify: []image.Watch{{WD: 1, Path: dir + "/none", Mask: 2}}}, "watch 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := restoreInto(t, synthetic(unixListener(t, made), c.file), p.Pid(), nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v does not say %q", err, c.want)
			}
			if _, err := os.Lstat(made); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind a socket: %v", err)
			}
			if !p.Alive() {
				t.Fatal("the target has ended")
			}
		})
	}
}

// TestCredentials looks at whom SO_PEERCRED names for sockets of a process that
// is not root, and at what belongs to it.
func TestCredentials(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	p := startTable(t, "wait", dir)
	path := filepath.Join(dir, "s")
	end := func(peer int) image.OpenFile {
		return image.OpenFile{Kind: image.FileSocket, Flags: unix.O_RDWR, Socket: &image.Socket{
			Family: unix.AF_UNIX, Type: unix.SOCK_STREAM, State: image.SocketConnected, Peer: peer}}
	}
	tcp := listener(inet4(192, 0, 2, 77, 0))
	tcp.UID, tcp.GID = 65534, 65533
	img := synthetic(unixListener(t, path), end(2), end(1), tcp)
	c := &img.Processes[0].Creds
	c.UID, c.GID = [4]uint32{65534, 65534, 65534, 65534}, [4]uint32{65533, 65533, 65533, 65533}
	var ctx *RestoreContext
	if err := restoreInto(t, img, p.Pid(), func(r *RestoreContext) {
		r.Addresses = map[string]string{"192.0.2.77": "127.0.0.1"}
		ctx = r
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(ctx.Created, []string{path}) {
		t.Errorf("created %q", ctx.Created)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	want := unix.Ucred{Pid: int32(p.Pid()), Uid: 65534, Gid: 65533}
	_ = raw.Control(func(fd uintptr) {
		if got, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil || *got != want {
			t.Errorf("the listener's credentials are %+v (%v)", got, err)
		}
	})
	if got, err := unix.GetsockoptUcred(duplicate(t, p.Pid(), 1), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil || *got != want {
		t.Errorf("the pair's credentials are %+v (%v)", got, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != 65534 || st.Mode&0o777 != 0o600 {
		t.Errorf("%s belongs to %d with mode %o: %v", path, st.Uid, st.Mode, err)
	}
	fd := duplicate(t, p.Pid(), 3)
	if err := unix.Fstat(fd, &st); err != nil || st.Uid != 65534 || st.Gid != 65533 {
		t.Errorf("the TCP socket belongs to %d:%d: %v", st.Uid, st.Gid, err)
	}
	if name, err := sys.Sockname(fd); err != nil || !strings.HasPrefix(addrString(name), "127.0.0.1:") {
		t.Errorf("the TCP socket is bound to %s: %v", addrString(name), err)
	}
	s, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil || !strings.Contains(string(s), "Uid:\t0\t0\t0\t0\n") {
		t.Errorf("the target's ids were not put back: %s %v", s, err)
	}
}

// TestMany moves thousands of descriptors, which need many messages, at numbers
// above the target's limit and in the way of its own.
func TestMany(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := startTable(t, "wait", t.TempDir())
	var lim unix.Rlimit
	if err := unix.Prlimit(p.Pid(), unix.RLIMIT_NOFILE, nil, &lim); err != nil {
		t.Fatal(err)
	}
	lim.Cur = 256
	if err := unix.Prlimit(p.Pid(), unix.RLIMIT_NOFILE, &lim, nil); err != nil {
		t.Fatal(err)
	}
	img := &image.Image{Processes: make([]image.Process, 1)}
	const n = 3000
	for i := range n {
		img.Files = append(img.Files, image.OpenFile{Kind: image.FileEventFD, Flags: unix.O_RDWR, EventFD: &image.EventFD{Count: uint64(i)}})
		img.Processes[0].FDs = append(img.Processes[0].FDs, image.FD{Num: i + i/1000*5000, File: i, CloseOnExec: i%2 == 0})
	}
	if err := restoreInto(t, img, p.Pid(), nil); err != nil {
		t.Fatal(err)
	}
	e := &examiner{pid: p.Pid(), content: true}
	if err := e.readTable(); err != nil {
		t.Fatal(err)
	}
	if len(e.table) != n {
		t.Fatalf("%d descriptors", len(e.table))
	}
	for i, en := range e.table {
		if en.num != i+i/1000*5000 || en.info.EventCount != uint64(i) || en.cloexec != (i%2 == 0) {
			t.Fatalf("descriptor %d is %+v", i, en)
		}
	}
	was := lim
	if err := unix.Prlimit(p.Pid(), unix.RLIMIT_NOFILE, nil, &lim); err != nil || lim != was {
		t.Errorf("the limit is %+v: %v", lim, err)
	}
}

// TestReset makes many connections that were reset.
func TestReset(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := startTable(t, "wait", t.TempDir())
	img := &image.Image{Processes: make([]image.Process, 1)}
	for i := range 500 {
		family := []int{unix.AF_INET, unix.AF_INET6}[i%2]
		img.Files = append(img.Files, image.OpenFile{Kind: image.FileSocket, Flags: unix.O_RDWR | unix.O_NONBLOCK, Socket: &image.Socket{
			Family: family, Type: unix.SOCK_STREAM, State: image.SocketClosed, Reset: i%3 != 0, Peer: -1}})
		img.Processes[0].FDs = append(img.Processes[0].FDs, image.FD{Num: i, File: i})
	}
	if err := restoreInto(t, img, p.Pid(), nil); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 2, 3, 498, 499} {
		fd := duplicate(t, p.Pid(), i)
		if f, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || f != img.Files[i].Socket.Family {
			t.Errorf("socket %d is of family %d: %v", i, f, err)
		}
		n, err := unix.Read(fd, make([]byte, 1))
		if img.Files[i].Socket.Reset {
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("socket %d reads %d, %v", i, n, err)
			}
			n, err = unix.Read(fd, make([]byte, 1))
		}
		if n != 0 || err != nil {
			t.Errorf("socket %d reads %d, %v", i, n, err)
		}
	}
}

// TestKeep restores around a descriptor that is to stay, also where an epoll
// registration is under its number.
func TestKeep(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := startTable(t, "wait", t.TempDir())
	img := synthetic(
		image.OpenFile{Kind: image.FileEpoll, Flags: unix.O_RDWR, Epoll: []image.EpollItem{{FD: 1500, File: 1, Events: unix.EPOLLIN, Data: 7}}},
		image.OpenFile{Kind: image.FileEventFD, Flags: unix.O_RDWR, EventFD: &image.EventFD{Count: 3}},
		image.OpenFile{Kind: image.FileDevice, Flags: unix.O_RDWR, Rdev: unix.Mkdev(1, 5)},
	)
	// The first restore puts /dev/zero where the second one is to keep it.
	img.Processes[0].FDs[2].Num = 1500
	if err := restoreInto(t, img, p.Pid(), nil); err != nil {
		t.Fatal(err)
	}
	img.Processes[0].FDs = img.Processes[0].FDs[:2]
	if err := restoreInto(t, img, p.Pid(), func(r *RestoreContext) { r.Keep = []int{1500} }); err != nil {
		t.Fatal(err)
	}
	e := &examiner{pid: p.Pid(), content: true}
	if err := e.readTable(); err != nil {
		t.Fatal(err)
	}
	if len(e.table) != 3 || e.table[2].num != 1500 || e.table[2].link != "/dev/zero" {
		t.Fatalf("%+v", e.table)
	}
	if ep := e.table[0].info.Epoll; len(ep) != 1 || ep[0].FD != 1500 || ep[0].Data != 7 {
		t.Errorf("%+v", ep)
	}
	var ev [1]unix.EpollEvent
	if n, err := unix.EpollWait(duplicate(t, p.Pid(), 0), ev[:], 0); n != 1 || err != nil {
		t.Errorf("%d events: %v", n, err)
	}
	img.Processes[0].FDs = append(img.Processes[0].FDs, image.FD{Num: 1500, File: 2})
	if err := restoreInto(t, img, p.Pid(), func(r *RestoreContext) { r.Keep = []int{1500} }); err == nil {
		t.Error("a number was both kept and wanted")
	}
}

// TestBigMemory looks at memfds larger than an image carries: they travel with the
// pages, mapped or not.
func TestBigMemory(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Memory(1<<30))
	for _, c := range []struct {
		name string
		size int
		mmap bool
	}{{"small", 1 << 20, false}, {"unmapped", 80 << 20, false}, {"mapped", 80 << 20, true}} {
		t.Run(c.name, func(t *testing.T) {
			fd, err := unix.MemfdCreate("big", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			for at := 0; at < c.size; at += len(b) {
				if _, err := unix.Pwrite(fd, b, int64(at)); err != nil {
					t.Fatal(err)
				}
			}
			if c.mmap {
				m, err := unix.Mmap(fd, 0, c.size, unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Munmap(m)
			}
			files, err := Examine(t.Context(), os.Getpid(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(files, func(f OpenFile) bool { return slices.Contains(f.FDs, fd) })
			if i < 0 || !files[i].Carried {
				t.Errorf("found %d: %+v", i, files)
			}
		})
	}
}
