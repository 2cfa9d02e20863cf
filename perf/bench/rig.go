package bench

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
)

// Rig is a program whose memory is missing, a real pager that serves it, and
// this process as the source's daemon, reading from another process over
// loopback TCP with plain lanes. The background stream is off, so that every
// touch is a fault and a fault alone.
type Rig struct {
	held    *exec.Cmd // the source's process
	heldOut *os.File
	mem     *proc.Memory
	server  *stream.Server
	pool    *transport.Pool
	ln      *tcp.Listener
	pager   *pager.Client
	arrived *exec.Cmd
	control *os.File
	dir     string
	pages   int // not touched yet

	lanes []transport.Lane
	wg    sync.WaitGroup
}

// touchBase is where the touching program has its region.
const touchBase = page.Addr(0x200000000000)

// ReadPages makes a Rig the server's source.
func (r *Rig) ReadPages(_ page.Space, rs []page.Range, buf []byte) error {
	return r.mem.ReadPages(rs, buf)
}

// NewRig makes a rig with pages missing pages, in whole MiB. touch is the
// compiled TouchSource, binary is pageferry. Close ends it.
func NewRig(ctx context.Context, touch, binary string, pages int) (_ *Rig, err error) {
	mib := max(1, (pages+255)/256)
	r := &Rig{pages: mib * 256}
	defer func() {
		if err != nil {
			err = fmt.Errorf("rig: %w", errors.Join(err, r.Close()))
		}
	}()
	if err := r.hold(touch, mib); err != nil {
		return nil, err
	}
	if r.server, err = stream.NewServer(stream.ServerConfig{Reader: r}); err != nil {
		return nil, err
	}
	if r.pool, err = transport.NewPool(2, page.Size); err != nil {
		return nil, err
	}
	plain := tcp.Config{Insecure: true, PlainPages: true}
	if r.ln, err = tcp.Listen("127.0.0.1:0", plain); err != nil {
		return nil, err
	}
	if r.dir, err = os.MkdirTemp("", "pageferry-rig"); err != nil {
		return nil, err
	}
	cfg := pager.Config{Command: []string{binary, "pager"}, Dir: r.dir}
	rand.Read(cfg.ID[:])
	if r.pager, err = pager.Start(ctx, cfg); err != nil {
		return nil, err
	}
	if err := r.connect(ctx, cfg.ID); err != nil {
		return nil, err
	}
	return r, r.arrive(ctx, touch, mib)
}

// hold starts the process that has the pages.
func (r *Rig) hold(touch string, mib int) (err error) {
	var w *os.File
	if r.heldOut, w, err = os.Pipe(); err != nil {
		return err
	}
	defer w.Close()
	cmd := exec.Command(touch, "hold", strconv.Itoa(mib))
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		return err
	}
	r.held = cmd
	if err := r.heldOut.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if _, err := r.heldOut.Read(make([]byte, 16)); err != nil {
		return fmt.Errorf("the source's process: %w", err)
	}
	r.mem, err = proc.OpenMemory(cmd.Process.Pid)
	return err
}

// connect opens the urgent lane and, as the pager expects one, a bulk lane.
func (r *Rig) connect(ctx context.Context, id transport.MigrationID) error {
	const epoch = 1
	key := tcp.NewKey()
	if err := r.pager.NewEpoch(ctx, epoch); err != nil {
		return err
	}
	d, err := tcp.NewDialer(tcp.Config{Insecure: true, PlainPages: true, Pool: r.pool})
	if err != nil {
		return err
	}
	for _, kind := range []transport.Kind{transport.Urgent, transport.Bulk} {
		type dialled struct {
			lane transport.Lane
			err  error
		}
		out := make(chan dialled, 1)
		go func() {
			l, err := d.DialLane(ctx, r.ln.Addr().String(), transport.LaneID{Migration: id, Epoch: epoch, Kind: kind}, key)
			out <- dialled{l, err}
		}()
		in, err := r.ln.Accept(ctx)
		if err == nil {
			err = errors.Join(r.pager.AttachLane(ctx, in.ID, key, in.Conn, nil, nil), in.Conn.Close())
		}
		o := <-out
		if err := errors.Join(err, o.err); err != nil {
			return err
		}
		r.lanes = append(r.lanes, o.lane)
		r.wg.Go(func() { _ = r.server.Serve(context.Background(), o.lane) })
	}
	return nil
}

// arrive starts the process without pages and hands it to the pager.
func (r *Rig) arrive(ctx context.Context, touch string, mib int) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var theirs *os.File
	r.control, theirs = os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	defer theirs.Close()
	// In blocking mode, with a limit: who touches may die.
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}); err != nil {
		return err
	}
	cmd := exec.Command(touch, "arrive", strconv.Itoa(mib))
	cmd.Stderr, cmd.ExtraFiles = os.Stderr, []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		return err
	}
	r.arrived = cmd
	b, oob := make([]byte, 1), make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(fds[0], b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return fmt.Errorf("the arriving process: %w", err)
	}
	uffd, err := onlyFD(oob[:n])
	if err != nil {
		return err
	}
	defer uffd.Close()
	region := page.Range{Start: touchBase, End: touchBase + page.Addr(mib)<<20}
	a := pager.Adoption{PID: cmd.Process.Pid, UFFD: uffd, Regions: []pager.Region{{Range: region, Kind: pager.Trapped}}}
	a.Lazy.Add(region)
	return r.pager.Adopt(ctx, a)
}

func onlyFD(oob []byte) (*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err == nil && len(fds) == 1 {
			return os.NewFile(uintptr(fds[0]), "userfaultfd"), nil
		}
	}
	return nil, errors.New("the arriving process gave no userfaultfd")
}

// maxTouch is how many touches the program does at once.
const maxTouch = 4096

// Touch has n more pages touched, at most 4096 and those that are left, one
// after the other, and returns how long each took.
func (r *Rig) Touch(n int) ([]time.Duration, error) {
	if n > maxTouch || n > r.pages {
		return nil, fmt.Errorf("rig: %d touches: at most %d, and %d pages are left", n, maxTouch, r.pages)
	}
	r.pages -= n
	fd := int(r.control.Fd())
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint32(nil, uint32(n))); err != nil {
		return nil, fmt.Errorf("rig: %w", err)
	}
	buf := make([]byte, 8*n)
	k, err := unix.Read(fd, buf)
	for err == unix.EINTR {
		k, err = unix.Read(fd, buf)
	}
	if err != nil || k != len(buf) {
		return nil, fmt.Errorf("rig: the arriving process has not answered: %d bytes, %w", k, errors.Join(err))
	}
	ds := make([]time.Duration, n)
	for i := range ds {
		ds[i] = time.Duration(binary.NativeEndian.Uint64(buf[8*i:]))
	}
	return ds, nil
}

// Usage is what the pager and the source's daemon, which is this process, have
// used so far.
func (r *Rig) Usage() (pager, source Usage, err error) {
	if pager, err = processUsage("/proc", r.pager.PID()); err == nil {
		source, err = processUsage("/proc", os.Getpid())
	}
	return pager, source, err
}

// Close ends everything. Idempotent.
func (r *Rig) Close() error {
	var errs []error
	kill := func(c *exec.Cmd) {
		if c != nil {
			_ = c.Process.Kill()
			_ = c.Wait() // says that it was killed
		}
	}
	kill(r.arrived) // first: without its pager it would read zeros
	if r.pager != nil {
		errs = append(errs, r.pager.Abort(context.Background()), r.pager.Close())
	}
	for _, l := range r.lanes {
		l.Close()
	}
	r.wg.Wait()
	if r.server != nil {
		errs = append(errs, r.server.Close())
	}
	if r.pool != nil {
		errs = append(errs, r.pool.Close())
	}
	if r.ln != nil {
		errs = append(errs, r.ln.Close())
	}
	if r.mem != nil {
		errs = append(errs, r.mem.Close())
	}
	kill(r.held)
	for _, f := range []*os.File{r.control, r.heldOut} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if r.dir != "" {
		errs = append(errs, os.RemoveAll(filepath.Clean(r.dir)))
	}
	*r = Rig{}
	return errors.Join(errs...)
}
