package fusemem

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const (
	envServer = "PAGEFERRY_FUSEMEM_SERVER"
	envSpace  = "PAGEFERRY_FUSEMEM_SPACE"
)

// The tests run in a mount namespace of their own: whatever becomes of them, no mount is left
// behind. What they start is in it, too.
func TestMain(m *testing.M) {
	if file := os.Getenv(envServer); file != "" {
		serve(file)
	}
	if os.Getenv(envReader) != "" {
		read(os.Args[1:])
	}
	if os.Getenv(envSpace) == "" && os.Geteuid() == 0 {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), envSpace+"=1"))
		}
		fmt.Fprintln(os.Stderr, "a mount namespace for the tests:", err)
		os.Exit(1)
	}
	testutil.Main(m)
}

// spec is what a server of the tests shows.
type spec struct {
	Dir      string
	VMAs     []VMA
	Files    []fileSpec
	Image    bool
	Takeover int // descriptor of the device to take over, 0 for a mount
	High     int // the number that it is given before
	Delay    time.Duration
	FailRate float64 // of the calls of ReadPages
	Seed     uint64
	Hold     bool // pages are given from "release" on
	InMemory int  // bytes that Memory has in memory from address 0 on, for benchmarks
	Verbose  bool
}

type fileSpec struct {
	Path string
	Size int64
	Mode os.FileMode
	From string // a file with its content. Default: content(tagFile+i)
	Held bool   // a Held with that content
}

// Tags of content.
const (
	tagMem   = 1
	tagImage = 2 // and the generation << 8
	tagFile  = 1 << 32
)

// content fills whole pages from first on with what only these pages of this tag have.
func content(tag uint64, first page.Num, buf []byte) {
	for len(buf) > 0 {
		x := tag*0x9e3779b97f4a7c15 ^ uint64(first)*0xbf58476d1ce4e5b9
		for i := 0; i < page.Size; i += 8 {
			x += 0x94d049bb133111eb
			binary.LittleEndian.PutUint64(buf[i:], x)
		}
		buf = buf[page.Size:]
		first++
	}
}

// source is the Source of the tests.
type source struct {
	*server
	tag  func() uint64
	from io.ReaderAt
}

// server is what the child process has.
type server struct {
	spec   spec
	fs     *FS
	ran    chan error // how Run ended
	gen    atomic.Uint64
	calls  atomic.Uint64
	demand atomic.Uint64 // calls with page.Demand
	most   atomic.Uint64 // bytes of the largest call since "most"

	mu   sync.Mutex
	held chan struct{} // closed when pages are given; nil where they are always
	rnd  *rand.Rand
}

func (s *server) holding() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

func (s *server) chance() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rnd.Float64()
}

func (s *source) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	s.calls.Add(1)
	if n := uint64(len(buf)); n > s.most.Load() { // one reader at a time where it is looked at
		s.most.Store(n)
	}
	if prio == page.Demand {
		s.demand.Add(1)
	}
	// The content is made before the wait: what the page was when it was asked for.
	if s.from != nil {
		clear(buf)
		if _, err := s.from.ReadAt(buf, int64(first.Addr())); err != nil && err != io.EOF {
			return err
		}
	} else {
		content(s.tag(), first, buf)
	}
	if held := s.holding(); held != nil {
		select {
		case <-held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.spec.Delay > 0 {
		select {
		case <-time.After(time.Duration(s.chance() * 2 * float64(s.spec.Delay))):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.spec.FailRate > 0 && s.chance() < s.spec.FailRate {
		clear(buf)
		return errors.New("as ordered")
	}
	return nil
}

func (s *server) config() Config {
	cfg := Config{Dir: s.spec.Dir, VMAs: s.spec.VMAs}
	if s.spec.Verbose {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	cfg.Memory = &source{server: s, tag: func() uint64 { return tagMem }}
	if s.spec.InMemory > 0 {
		cfg.Memory = inMemory(s.spec.InMemory)
	}
	if s.spec.Image {
		cfg.Image = &source{server: s, tag: func() uint64 { return tagImage + s.gen.Load()<<8 }}
	}
	for i, f := range s.spec.Files {
		src := &source{server: s, tag: func() uint64 { return tagFile + uint64(i) }}
		if f.From != "" {
			file, err := os.Open(f.From)
			if err != nil {
				fail(err)
			}
			src.from = file
		}
		cfg.Files = append(cfg.Files, File{Path: f.Path, Size: f.Size, ModTime: time.Unix(1e9, 5), Mode: f.Mode, Source: src})
		if f.Held {
			cfg.Files[i].Source = &counted{Held: hold(tagFile+uint64(i), f.Size), calls: &s.calls}
		}
	}
	n := 0
	cfg.Status = func() any {
		n++ // never the same twice
		return map[string]any{"state": "test", "pad": strings.Repeat("x", 20000+n%7), "n": n}
	}
	cfg.Resident = func() []byte { return []byte{0xf0, 1, 2} }
	return cfg
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	fmt.Println("error", err)
	os.Exit(1)
}

// serve is the child process: it serves what file says until its standard input ends, and obeys the lines there.
func serve(file string) {
	s := &server{}
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &s.spec)
	}
	if err != nil {
		fail(err)
	}
	s.rnd = rand.New(rand.NewPCG(s.spec.Seed, 1))
	if s.spec.Hold {
		s.held = make(chan struct{})
	}
	if fd := s.spec.Takeover; fd != 0 {
		if s.spec.High > 0 {
			low := fd
			if fd, err = unix.FcntlInt(uintptr(low), unix.F_DUPFD_CLOEXEC, s.spec.High); err != nil {
				fail(err)
			}
			_ = unix.Close(low)
		}
		s.fs, err = Takeover(s.config(), fd)
	} else {
		s.fs, err = Mount(s.config())
	}
	if err != nil {
		fail(err)
	}
	s.ran = make(chan error, 1)
	go func() { s.ran <- s.fs.Run(context.Background()) }()
	fmt.Println("ready", s.fs.DeviceFD())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		go func(line string) { fmt.Println(s.obey(line)) }(in.Text())
	}
	if err := s.fs.Close(); err != nil {
		fail(err)
	}
	if err := <-s.ran; err != nil && !errors.Is(err, ErrGone) {
		fail(err)
	}
	os.Exit(0)
}

// obey carries out one line, "id verb numbers...", and returns "id ok ..." or "id error ...".
func (s *server) obey(line string) string {
	var id int
	var verb string
	var a, b, c uint64
	_, _ = fmt.Sscan(line, &id, &verb, &a, &b, &c)
	buf := make([]byte, b)
	first := page.Num(a >> page.Shift)
	var err error
	var says any = ""
	switch verb {
	case "hold", "release":
		s.mu.Lock()
		if s.held != nil {
			close(s.held)
			s.held = nil
		}
		if verb == "hold" {
			s.held = make(chan struct{})
		}
		s.mu.Unlock()
	case "storemem":
		content(tagMem, first, buf)
		err = s.fs.StoreMem(page.Addr(a), buf)
	case "storefile":
		content(tagFile+c, first, buf)
		err = s.fs.StoreFile(int(c), a, buf)
	case "storeimage":
		content(tagImage+s.gen.Load()<<8, first, buf)
		err = s.fs.StoreImage(a, buf)
	case "awaitfile":
		err = s.fs.AwaitFile(context.Background(), int(c), a, b)
	case "gen":
		s.gen.Store(a)
	case "invalidate":
		err = s.fs.InvalidateImage(a, b)
	case "shrink": // which nobody may
		err = unix.Ftruncate(s.fs.cfg.Files[a].Source.(*counted).fd, 0)
	case "calls":
		says = s.calls.Load()
	case "storeall": // what Memory has, and how long it takes
		begin := time.Now()
		err = s.fs.StoreMem(0, s.fs.cfg.Memory.(memory))
		says = time.Since(begin).Nanoseconds()
	case "most":
		says = s.most.Swap(0)
	case "readahead":
		err = s.fs.SetReadAhead(int(a))
	case "demand":
		says = s.demand.Load()
	case "waiting":
		says = s.fs.Stats().Waiting
	case "interrupted":
		says = s.fs.Stats().Interrupted
	case "takeover":
		err = s.fs.CanTakeOver()
	case "close":
		err = s.fs.Close()
	case "ran": // waits for the end of Run and says how it ended
		err = <-s.ran
		s.ran <- err
	default:
		err = fmt.Errorf("what is %q?", line)
	}
	if err != nil {
		return fmt.Sprint(id, " error ", err)
	}
	return fmt.Sprint(id, " ok ", says)
}

// inMemory is a Source that has its pages at once.
type memory []byte

func inMemory(size int) page.Source {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		fail(err)
	}
	content(tagMem, 0, b)
	return memory(b)
}

func (m memory) ReadPages(_ context.Context, first page.Num, buf []byte, _ page.Priority) error {
	at := int(first.Addr())
	if at+len(buf) > len(m) {
		return ErrUnmapped
	}
	copy(buf, m[at:])
	return nil
}
