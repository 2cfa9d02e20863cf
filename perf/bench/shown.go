package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
)

// shownArg0 is a process that shows memory as files, or the source of one that does:
// the reader must not be a process that serves its own reads.
const shownArg0 = "pageferry-bench-shown"

// What a shown process serves.
const (
	shownHere   = "here"   // memory that it has, by fusemem
	shownRemote = "remote" // memory of a source, by fusemem and a fetcher
	shownSource = "source" // that source
	shownBare   = "bare"   // memory that it has, by go-fuse alone
)

// shownConfig is the argument of shownArg0.
type shownConfig struct {
	What    string
	Dir     string // to mount on
	Size    int    // bytes of memory
	Address string // of shownRemote, for shownSource
	Key     []byte // of the lanes
}

// shown is such a process.
type shown struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	ready string // what it said first
	dir   string // where it mounts
}

func startShown(c shownConfig) (_ *shown, err error) {
	arg, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	s := &shown{cmd: exec.Command("/proc/self/exe")}
	s.cmd.Args = []string{shownArg0, string(arg)}
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if s.ready, err = s.line(); err != nil {
		return nil, errors.Join(fmt.Errorf("shown %s: %w", c.What, err), s.Close())
	}
	return s, nil
}

func (s *shown) line() (string, error) {
	l, err := s.out.ReadString('\n')
	return strings.TrimSpace(l), err
}

// fetch has a shownRemote ask for n pages, one after the other, and returns the median.
func (s *shown) fetch(n int) (time.Duration, error) {
	if _, err := fmt.Fprintln(s.in, n); err != nil {
		return 0, err
	}
	l, err := s.line()
	if err != nil {
		return 0, err
	}
	return time.ParseDuration(l)
}

// Close ends it; it unmounts.
func (s *shown) Close() error {
	_ = s.in.Close()
	return s.cmd.Wait()
}

// runShown is the life of such a process.
func runShown(arg string) error {
	var c shownConfig
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	awake, err := sys.StayAwake() // as a pager does
	if err == nil {
		defer awake.Close()
	}
	if c.What == shownBare {
		return c.serveBare()
	}
	if c.What == shownSource {
		return c.serveSource()
	}
	mount := fusemem.Config{Dir: c.Dir, VMAs: []fusemem.VMA{{Range: page.Range{End: page.Addr(c.Size)}, Perms: "rw-p"}}}
	var f *stream.Fetcher
	say := ""
	if c.What == shownRemote {
		ln, err := tcp.Listen("127.0.0.1:0", tcp.Config{Insecure: true, PlainPages: true})
		if err != nil {
			return err
		}
		defer ln.Close()
		st, err := pagestore.Create("bench")
		if err != nil {
			return err
		}
		defer st.Close()
		f = stream.NewFetcher(stream.FetcherConfig{Store: st, OnUrgent: func() { fault.RaisePriority(nil) }})
		defer f.Close()
		go c.attach(ln, f)
		mount.Memory, say = f.Source(0), ln.Addr().String()
	} else if mount.Memory, err = newShownMemory(c.Size); err != nil {
		return err
	}
	file := mount.Memory
	if c.What == shownHere {
		held, err := holdShown(mount.Memory.(shownMemory))
		if err != nil {
			return err
		}
		defer held.Close()
		file = held
	}
	mount.Files = []fusemem.File{{Path: "/file", Size: int64(c.Size), Source: file}}
	m, err := fusemem.Mount(mount)
	if err != nil {
		return err
	}
	ran := make(chan error, 1)
	go func() { ran <- m.Run(context.Background()) }()
	fmt.Println("ready", say)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var n int
		_, _ = fmt.Sscan(in.Text(), &n)
		var took []time.Duration
		buf := make([]byte, page.Size)
		for range n {
			begin := time.Now()
			if err := mount.Memory.ReadPages(context.Background(), page.Num(rand.IntN(c.Size>>page.Shift)), buf, page.Demand); err != nil {
				return err
			}
			took = append(took, time.Since(begin))
		}
		fmt.Println(Median(took))
	}
	return errors.Join(m.Close(), <-ran)
}

// attach takes the lanes of a source.
func (c *shownConfig) attach(ln *tcp.Listener, f *stream.Fetcher) {
	for {
		in, err := ln.Accept(context.Background())
		if err != nil {
			return // the end
		}
		pool, err := transport.NewPool(2, 256<<10)
		if err == nil {
			var l transport.Lane
			l, err = tcp.AcceptLane(context.Background(), in.Conn, in.ID, c.Key, tcp.Config{Insecure: true, PlainPages: true, Pool: pool})
			if err == nil {
				err = f.Attach(l)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "a lane:", err)
		}
	}
}

// serveSource is the source's end of the lanes.
func (c *shownConfig) serveSource() error {
	m, err := newShownMemory(c.Size)
	if err != nil {
		return err
	}
	server, err := stream.NewServer(stream.ServerConfig{Reader: frozenMemory(m), OnUrgent: func() { fault.RaisePriority(nil) }})
	if err != nil {
		return err
	}
	d, err := tcp.NewDialer(tcp.Config{Insecure: true, PlainPages: true})
	if err != nil {
		return err
	}
	for i, kind := range []transport.Kind{transport.Urgent, transport.Bulk, transport.Bulk} {
		l, err := d.DialLane(context.Background(), c.Address, transport.LaneID{Migration: transport.MigrationID{1}, Epoch: 1, Kind: kind, Index: uint8(max(0, i-1))}, c.Key)
		if err != nil {
			return err
		}
		go func() { _ = server.Serve(context.Background(), l) }()
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil // and the lanes with the process
}

// shownMemory is memory outside the heap, of random bytes, as a page.Source.
type shownMemory []byte

func newShownMemory(size int) (shownMemory, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	r := rand.NewChaCha8([32]byte{})
	_, err = r.Read(b)
	return b, err
}

// errBeyond: more was asked for than there is.
var errBeyond = errors.New("beyond the end of the memory")

func (m shownMemory) ReadPages(_ context.Context, first page.Num, buf []byte, _ page.Priority) error {
	at := uint64(first.Addr())
	if at+uint64(len(buf)) > uint64(len(m)) {
		return errBeyond
	}
	copy(buf, m[at:])
	return nil
}

// Lend makes it a fusemem.Lender.
func (m shownMemory) Lend(first page.Num, n int) []byte {
	return m[first.Addr():][:n<<page.Shift]
}

// holdShown holds it as a pager holds a file.
func holdShown(m shownMemory) (*fusemem.Held, error) {
	fd, err := unix.MemfdCreate("pageferry-bench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	for at := 0; at < len(m); {
		n, err := unix.Pwrite(fd, m[at:], int64(at))
		if err != nil {
			return nil, err
		}
		at += n
	}
	return fusemem.NewHeld(fd, int64(len(m))), nil
}

// frozenMemory is the same as the source's server sees it.
type frozenMemory []byte

func (m frozenMemory) ReadPages(_ page.Space, rs []page.Range, buf []byte) error {
	for _, r := range rs {
		if uint64(r.End) > uint64(len(m)) {
			return errBeyond
		}
		buf = buf[copy(buf, m[r.Start:r.End]):]
	}
	return nil
}

// view is an open file of which a benchmark reads size bytes.
type view struct {
	*os.File
	size int
}

// forget has the page cache give the file up; tmpfs keeps it.
func (v view) forget() error { return unix.Fadvise(int(v.Fd()), 0, int64(v.size), unix.FADV_DONTNEED) }

// read reads it from beginning to end by read(2).
func (v view) read(buf []byte) (time.Duration, error) {
	if err := v.forget(); err != nil {
		return 0, err
	}
	begin := time.Now()
	for at := 0; at < v.size; at += len(buf) {
		if n, err := v.ReadAt(buf, int64(at)); n < len(buf) {
			return 0, fmt.Errorf("%d bytes at %d: %w", n, at, err)
		}
	}
	return time.Since(begin), nil
}

// touched keeps accesses from being left out.
var touched byte

func (v view) mapped(f func(m []byte)) error {
	if err := v.forget(); err != nil {
		return err
	}
	m, err := unix.Mmap(int(v.Fd()), 0, v.size, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	f(m)
	return unix.Munmap(m)
}

// touch touches each of its pages through a mapping, from beginning to end.
func (v view) touch() (took time.Duration, err error) {
	err = v.mapped(func(m []byte) {
		begin := time.Now()
		for at := 0; at < len(m); at += page.Size {
			touched += m[at]
		}
		took = time.Since(begin)
	})
	return took, err
}

// faults touches n pages at random and returns the median of what one took.
func (v view) faults(n int) (p50 time.Duration, err error) {
	err = v.mapped(func(m []byte) {
		if err = unix.Madvise(m, unix.MADV_RANDOM); err != nil {
			return
		}
		order := rand.Perm(v.size / page.Size)
		var took []time.Duration
		for _, i := range order[:min(n, len(order))] {
			begin := time.Now()
			touched += m[i*page.Size]
			took = append(took, time.Since(begin))
		}
		slices.Sort(took)
		p50 = took[len(took)/2]
	})
	return p50, err
}
