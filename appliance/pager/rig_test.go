package pager

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "pager" {
		os.Exit(Main(os.Args[2:]))
	}
	// A pager that is killed leaves its keeper to us, as to a daemon that
	// adopts orphans.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	testutil.Main(m)
}

//go:embed testdata/arrival.c
var arrivalSource string

const arrivalBase = page.Addr(0x200000000000)

// program is a process that arrives without its memory.
type program struct {
	*testutil.Process
	control *os.File
	uffd    *os.File
	pages   int
}

func startProgram(t testing.TB, mode string, pages, threads int, seed uint64) *program {
	t.Helper()
	exe := testutil.CCText(t, "arrival", arrivalSource)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control")
	cmd := exec.Command(exe, mode, fmt.Sprint(pages), fmt.Sprint(threads), fmt.Sprint(seed))
	cmd.ExtraFiles = []*os.File{theirs}
	p := &program{Process: testutil.StartCmd(t, cmd, 2*time.Minute), control: ours, pages: pages}
	theirs.Close()
	t.Cleanup(func() { ours.Close() })
	if err := unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		t.Fatal(err)
	}
	b, oob := make([]byte, 1), make([]byte, 64)
	_, on, _, _, err := unix.Recvmsg(fds[0], b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	files := rights(oob[:on])
	if len(files) != 1 {
		t.Fatalf("%d descriptors", len(files))
	}
	p.uffd = files[0]
	return p
}

// say sends the byte that begins the program's work, or the one that ends it.
func (p *program) say(t testing.TB) {
	t.Helper()
	if _, err := p.control.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
}

// hear waits for a byte that the program sends.
func (p *program) hear(t testing.TB) {
	t.Helper()
	if n, err := p.control.Read(make([]byte, 1)); n != 1 {
		t.Fatalf("program: %v\n%s", err, p.Text())
	}
}

// finish ends the program's work and demands that it found everything right.
func (p *program) finish(t testing.TB) string {
	t.Helper()
	p.say(t)
	if err := p.Wait(time.Minute); err != nil {
		t.Fatalf("program: %v\n%s", err, p.Text())
	}
	if !strings.Contains(p.Text(), "verified") {
		t.Fatalf("program did not verify: %s", p.Text())
	}
	return p.Text()
}

// adoption is everything that the pager needs to know of the program.
func (p *program) adoption() Adoption {
	a := Adoption{PID: p.Pid(), UFFD: p.uffd}
	a.Regions = []Region{{Range: page.Range{Start: arrivalBase, End: arrivalBase + page.Addr(p.pages)<<page.Shift}, Kind: Trapped}}
	for i := range p.pages {
		if i%11 != 5 {
			at := arrivalBase + page.Addr(i)<<page.Shift
			a.Lazy.Add(page.Range{Start: at, End: at + page.Size})
		}
	}
	return a
}

func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb
	return x ^ (x >> 31)
}

// source is the frozen process, made of arithmetic.
type source struct {
	delay atomic.Int64 // of each read, in nanoseconds
	reads atomic.Int64 // pages
	gone  atomic.Bool
	// ready holds pages that were made before, for measurements.
	ready []byte
}

func (s *source) ReadPages(_ page.Space, rs []page.Range, buf []byte) error {
	if s.gone.Load() {
		return stream.ErrGone
	}
	if d := s.delay.Load(); d > 0 {
		time.Sleep(time.Duration(d))
	}
	for _, r := range rs {
		if s.ready != nil {
			n := copy(buf, s.ready[r.Start-arrivalBase:r.End-arrivalBase])
			buf = buf[n:]
			continue
		}
		for a := r.Start; a < r.End; a += page.Size {
			fillPage(buf[:page.Size], uint64((a-arrivalBase)>>page.Shift))
			buf = buf[page.Size:]
		}
		s.reads.Add(int64(r.Pages()))
	}
	return nil
}

func fillPage(b []byte, i uint64) {
	if i%7 == 3 || i%11 == 5 {
		clear(b)
		return
	}
	for k := range uint64(512) {
		binary.LittleEndian.PutUint64(b[k*8:], mix(i*512+k))
	}
}

// rig is a source's daemon, a destination's daemon and a pager.
type rig struct {
	t      testing.TB
	cfg    Config
	c      *Client
	src    *source
	server *stream.Server
	ln     *tcp.Listener
	epoch  uint32
	key    []byte

	mu    sync.Mutex
	lanes []transport.Lane // the source's ends
	wg    sync.WaitGroup
	once  sync.Once
}

func limit(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func newRig(t *testing.T) *rig {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Userfaultfd)
	testutil.NoLeaks(t)
	src := new(source)
	r := newRigWith(t, src, func(*Config) {})
	r.src = src
	return r
}

func newRigWith(t testing.TB, reader stream.PageReader, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, key: make([]byte, tcp.KeySize)}
	for i := range r.key {
		r.key[i] = byte(rand.Uint32())
	}
	log, err := os.Create(t.TempDir() + "/pager.log")
	if err != nil {
		t.Fatal(err)
	}
	r.cfg = Config{Command: []string{os.Args[0], "pager"}, Dir: t.TempDir(), StallTimeout: 5 * time.Second, Log: log}
	for i := range r.cfg.ID {
		r.cfg.ID[i] = byte(rand.Uint32())
	}
	change(&r.cfg)
	t.Cleanup(func() {
		b, _ := os.ReadFile(log.Name())
		if t.Failed() {
			t.Logf("the pager's log:\n%s", b)
		}
		log.Close()
	})
	if r.ln, err = tcp.Listen("127.0.0.1:0", tcp.Config{Insecure: true, PlainPages: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.ln.Close() })
	if r.server, err = stream.NewServer(stream.ServerConfig{Reader: reader, Buffers: 8}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	if r.c, err = Start(limit(t, 20*time.Second), r.cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.drop(r.c) })
	return r
}

// drop ends a pager that the test has not ended itself.
func (r *rig) drop(c *Client) {
	if err := c.Abort(context.Background()); err != nil {
		r.t.Error(err)
	}
	c.Close()
}

// connect opens the lanes of a new epoch.
func (r *rig) connect(bulk int) {
	r.t.Helper()
	ctx := limit(r.t, 20*time.Second)
	r.epoch++
	if err := r.c.NewEpoch(ctx, r.epoch); err != nil {
		r.t.Fatal(err)
	}
	r.lane(ctx, transport.Urgent, 0)
	for i := range bulk {
		r.lane(ctx, transport.Bulk, uint8(i))
	}
}

func (r *rig) lane(ctx context.Context, kind transport.Kind, index uint8) {
	r.t.Helper()
	d, err := tcp.NewDialer(tcp.Config{Insecure: true, PlainPages: true})
	if err != nil {
		r.t.Fatal(err)
	}
	id := transport.LaneID{Migration: r.cfg.ID, Epoch: r.epoch, Kind: kind, Index: index}
	dialled := make(chan error, 1)
	var l transport.Lane
	go func() {
		var err error
		l, err = d.DialLane(ctx, r.ln.Addr().String(), id, r.key)
		dialled <- err
	}()
	in, err := r.ln.Accept(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	err = r.c.AttachLane(ctx, in.ID, r.key, in.Conn, nil, nil)
	in.Conn.Close()
	if err := errors.Join(err, <-dialled); err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.lanes = append(r.lanes, l)
	r.mu.Unlock()
	r.wg.Go(func() { _ = r.server.Serve(context.Background(), l) })
}

// close ends the source's daemon. Idempotent.
func (r *rig) close() {
	r.cut()
	r.wg.Wait()
	r.once.Do(func() {
		if err := r.server.Close(); err != nil {
			r.t.Error(err)
		}
		r.ln.Close()
	})
}

// cut closes the source's ends of all lanes.
func (r *rig) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.lanes {
		l.Close()
	}
	r.lanes = nil
}

// adopt hands a program to the pager and lets go of its descriptor.
func (r *rig) adopt(p *program) {
	r.t.Helper()
	if err := r.c.Adopt(limit(r.t, 20*time.Second), p.adoption()); err != nil {
		r.t.Fatal(err)
	}
	p.uffd.Close()
}

func (r *rig) do(what string, f func(context.Context) error) {
	r.t.Helper()
	if err := f(limit(r.t, 60*time.Second)); err != nil {
		st, _ := r.c.Stats(limit(r.t, time.Second))
		r.t.Fatalf("%s: %v\n%+v", what, err, st)
	}
}

func (r *rig) stats() Stats {
	r.t.Helper()
	st, err := r.c.Stats(limit(r.t, 10*time.Second))
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

func itoa(n int) string { return fmt.Sprint(n) }

func exitStatus(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		if ws, ok := e.Sys().(syscall.WaitStatus); ok {
			return int(ws)
		}
	}
	return 0
}

// adoptionAgain is an adoption without descriptors of pages that were adopted.
func (p *program) adoptionAgain() Adoption {
	a := p.adoption()
	a.UFFD = p.control
	return a
}
