package fusemem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

// notifyResend is FUSE_NOTIFY_RESEND of include/uapi/linux/fuse.h, since Linux 6.9.
const notifyResend = 7

func noResend(err error) error {
	return &sys.NotSupported{Feature: "taking a FUSE mount over from a process that was killed", Since: "6.9", Err: err}
}

// CanTakeOver returns nil if another process can go on with this mount when this one was killed,
// else a *sys.NotSupported.
func (f *FS) CanTakeOver() error {
	if f.server.KernelSettings().Flags64()&fuse.CAP_HAS_RESEND == 0 {
		return noResend(errors.New("INIT has no FUSE_HAS_RESEND"))
	}
	return nil
}

// Takeover goes on with the mount of a process that was killed, over a descriptor of its device
// that somebody kept. cfg must say what it said there. Nobody who waits for a READ notices. The
// descriptor becomes the FS's, and gets a number from FirstFD on if it has none; on failure it
// stays the caller's, and the mount as it is. The killed process must be gone with all its threads.
func Takeover(cfg Config, deviceFD int) (*FS, error) {
	f, err := newFS(cfg)
	if err != nil {
		return nil, err
	}
	m, err := findMount(f.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("fusemem: take over the mount on %s: %w", f.cfg.Dir, err)
	}
	if m.source != f.source() {
		return nil, fmt.Errorf("fusemem: take over the mount on %s: it is %s, but this configuration makes %s", f.cfg.Dir, m.source, f.source())
	}
	if err := isDevice(deviceFD, m.minor); err != nil {
		return nil, fmt.Errorf("fusemem: take over the mount on %s: descriptor %d %w", f.cfg.Dir, deviceFD, err)
	}
	f.dev, f.device = m.minor, deviceFD
	if deviceFD < FirstFD {
		if f.device, err = unix.FcntlInt(uintptr(deviceFD), unix.F_DUPFD_CLOEXEC, FirstFD); err != nil {
			return nil, fmt.Errorf("fusemem: descriptor %d: %w", deviceFD, err)
		}
	}
	// What the killed process had read and not answered is sent again. From here on a failure loses
	// nothing: it waits in the kernel for whoever takes over next.
	err = resend(f.device)
	if err == nil {
		err = f.greet()
	}
	if f.device != deviceFD {
		other := deviceFD
		if err != nil {
			other = f.device
		}
		unix.Close(other)
	}
	if err != nil {
		return nil, fmt.Errorf("fusemem: take over the mount on %s: %w", f.cfg.Dir, err)
	}
	f.readAhead()
	return f, nil
}

// isDevice tells why a descriptor is not that of the connection of the mount with this device
// number.
func isDevice(fd int, minor uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("is not open: %w", err)
	}
	const miscMajor, fuseMinor = 10, 229 // include/linux/miscdevice.h
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(miscMajor, fuseMinor) {
		return errors.New("is not /dev/fuse")
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return fmt.Errorf("cannot be looked at: %w", err)
	}
	// fs/fuse/dev.c, fuse_dev_show_fdinfo; older kernels do not say.
	for line := range strings.Lines(string(info)) {
		if c, ok := strings.CutPrefix(line, "fuse_connection:"); ok && strings.TrimSpace(c) != fmt.Sprint(minor) {
			return fmt.Errorf("belongs to another mount, 0:%s", strings.TrimSpace(c))
		}
	}
	return nil
}

// greet makes the server. The kernel sends INIT once, so go-fuse gets one from us, over a socket,
// which then becomes the device: its descriptor is replaced before anybody reads from it again.
func (f *FS) greet() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if _, err := unix.Write(pair[1], initRequest()); err != nil {
		return fmt.Errorf("INIT: %w", err)
	}
	fd, err := unix.FcntlInt(uintptr(pair[0]), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return err
	}
	if f.server, err = fuse.NewServer(f.raw(), fmt.Sprintf("/dev/fd/%d", fd), f.options()); err != nil {
		return err
	}
	f.warm()
	return unix.Dup3(f.device, fd, unix.O_CLOEXEC)
}

// initRequest is a fuse_in_header and a fuse_init_in that offer all that go-fuse could choose: it
// chooses by its options, which are as they were, and does not look at them again but for the
// version.
func initRequest() []byte {
	const headerSize, inSize, opInit = 40, 64, 26
	b := make([]byte, 0, headerSize+inSize)
	b = binary.NativeEndian.AppendUint32(b, headerSize+inSize)
	b = binary.NativeEndian.AppendUint32(b, opInit)
	b = binary.NativeEndian.AppendUint64(b, 2) // unique
	b = b[:headerSize]                         // node, caller and extensions are 0
	const major, minor, maxReadAhead = 7, 40, 128 << 10
	for _, v := range []uint32{major, minor, maxReadAhead, 1<<32 - 1, 1<<32 - 1} {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b[:headerSize+inSize]
}

// resend writes the notification, a bare fuse_out_header.
func resend(fd int) error {
	b := make([]byte, 0, 16)
	b = binary.NativeEndian.AppendUint32(b, 16)
	b = binary.NativeEndian.AppendUint32(b, notifyResend)
	b = binary.NativeEndian.AppendUint64(b, 0)
	_, err := unix.Write(fd, b)
	if errors.Is(err, unix.EINVAL) { // an unknown notification
		return noResend(err)
	}
	if err != nil {
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
	}
	return nil
}
