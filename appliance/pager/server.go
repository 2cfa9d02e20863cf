package pager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// server is the pager's process.
type server struct {
	cfg     settings
	log     *slog.Logger
	store   *pagestore.Store
	trap    *fault.Trap
	fetch   *stream.Fetcher
	pool    *transport.Pool
	awake   *os.File               // keeps the host's processors from sleeping
	whole   chan struct{}          // closed when what a former pager left undone is done
	landing atomic.Pointer[lander] // of the round that is going on
	landed  atomic.Uint64          // pages of the rounds before it
	// written are the pages of process landPID that may hold something else than
	// zeros: known to whoever does a round, one at a time.
	written page.Set
	landPID int
	// fromFile: pages come from a file, for which there is no other to ask.
	fromFile atomic.Bool
	sock     *net.UnixListener
	// of what is shown as files; see show.go
	shown  shown
	veiled atomic.Pointer[veiled]
	backed atomic.Pointer[[]Backed]
	// filesLost: see Stats
	filesLost atomic.Bool

	ctx    context.Context // ends with the pager
	cancel context.CancelFunc
	done   chan struct{} // closed when the pager shall end
	once   sync.Once

	mu      sync.Mutex
	me      who
	conns   map[*conn]bool
	eager   chan struct{} // closed while no eager page is missing
	all     chan struct{} // closed while no page is missing
	leaving bool
	fs      *fusemem.FS
	fabric  fabric
	held    map[int]*fusemem.Held // files that are here
	lost    error                 // every page lane refused because the source's pages are gone
}

// run is the life of a pager: c is its first control connection.
func run(c *conn, keeper int, log *slog.Logger) error {
	s := &server{
		log: log, done: make(chan struct{}), conns: map[*conn]bool{},
		eager: make(chan struct{}), all: make(chan struct{}), whole: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	defer s.cancel()
	p, files, err := c.recv()
	closeAll(files)
	if err == nil && p.Op != opHello {
		err = fmt.Errorf("pager: first packet is %q", p.Op)
	}
	if err == nil {
		s.cfg, err = decode[settings](p)
	}
	if err == nil {
		s.log = log.With("migration", s.cfg.ID)
		err = s.begin(keeper)
	}
	if err != nil {
		_ = c.send(packet{ID: p.ID, Op: opReply, Err: err.Error(), Code: codeOf(err)}, nil)
		_ = unix.Kill(keeper, unix.SIGKILL)
		return err
	}
	defer s.end()
	go s.accept()
	go s.guardKeeper(keeper)
	go s.progress()
	go s.abandon()
	s.mu.Lock()
	me := s.me
	s.conns[c] = true
	s.mu.Unlock()
	if err := c.send(packet{ID: p.ID, Op: opReply}, me); err != nil {
		s.log.Warn("the daemon is gone already", "err", err)
	}
	go s.serve(c)
	<-s.done
	return nil
}

// littleLeft is so little memory that it is here before a head start would be over.
const littleLeft = 8 << 20

// begin makes everything ready, or takes it over from a former pager's keeper.
func (s *server) begin(keeper int) error {
	if s.cfg.KeeperCgroup != "" {
		if err := os.WriteFile(filepath.Join(s.cfg.KeeperCgroup, "cgroup.procs"), fmt.Appendf(nil, "%d", keeper), 0); err != nil {
			return fmt.Errorf("pager: keeper's cgroup: %w", err)
		}
	}
	var err error
	if s.cfg.OldKeeper != 0 {
		err = s.takeStore()
	} else {
		s.store, err = pagestore.Create(storeName)
	}
	if err != nil {
		return err
	}
	if !s.cfg.IdleSleep {
		if s.awake, err = sys.StayAwake(); err != nil { // until this process ends
			s.log.Debug("waking processors will take its time", "err", err)
		}
	}
	// A TCP lane holds one buffer at a time, one over RDMA a few; lanes of two epochs
	// may overlap.
	if s.pool, err = transport.NewPool(4*(s.cfg.BulkLanes+2), payloadSize); err != nil {
		return err
	}
	s.trap, err = fault.New(fault.Config{
		Store: s.store, Log: s.log,
		Request: func(src page.Space, ns []page.Num) { s.fetch.Urgent(src, ns) },
	})
	if err != nil {
		return err
	}
	s.fetch = stream.NewFetcher(stream.FetcherConfig{
		Store: s.store, Placer: placer{s.trap, s}, Window: s.cfg.Window, Chunk: s.cfg.Chunk, StallTimeout: s.cfg.StallTimeout,
		HeadStart: s.cfg.HeadStart, HeadStartOver: littleLeft, Waiting: s.trap.Waiting, Remote: s.pool, Log: s.log,
		OnUrgent:   func() { fault.RaisePriority(s.log) },
		OnLost:     s.laneLost,
		OnEager:    func() { s.settled(&s.eager, EagerDone) },
		OnResident: func() { s.settled(&s.all, Resident) },
	})
	if s.cfg.OldKeeper != 0 {
		if err := s.takeOver(); err != nil {
			return err
		}
	} else {
		close(s.whole)
	}
	start, err := startTime(os.Getpid())
	if err != nil {
		return fmt.Errorf("pager: own start time: %w", err)
	}
	kstart, err := startTime(keeper)
	if err != nil {
		return fmt.Errorf("pager: keeper's start time: %w", err)
	}
	path := filepath.Join(s.cfg.Dir, socketName)
	_ = os.Remove(path) // of a pager that was killed
	if s.sock, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"}); err != nil {
		return fmt.Errorf("pager: listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("pager: socket: %w", err)
	}
	if err := s.sign(who{ID: s.cfg.ID, PID: os.Getpid(), Start: start, Keeper: keeper, KeeperStart: kstart}); err != nil {
		return err
	}
	if s.cfg.OldKeeper != 0 {
		if err := s.succession(); err != nil {
			return err
		}
	}
	go s.runTrap()
	return nil
}

// sign writes who is here now.
func (s *server) sign(me who) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	me.Before = s.cfg.Before // they may not be gone yet
	s.me = me
	return writeState(s.cfg.Dir, s.me)
}

// runTrap serves faults, as soon as nobody else does.
func (s *server) runTrap() {
	select {
	case <-s.whole:
	case <-s.ctx.Done():
		return
	}
	if s.cfg.OldKeeper != 0 {
		s.fetch.Start(s.store.Flag(pagestore.FlagFetching))
	}
	if err := s.trap.Run(); err != nil {
		s.log.Error("the trap has ended: faults are not answered any more", "err", err)
	}
}

// payloadSize is the largest payload that a lane takes, in bytes.
const payloadSize = 256 << 10

// end undoes begin. The keeper is dead or none of its business any more.
func (s *server) end() {
	s.cancel()
	_ = s.sock.Close()
	s.trap.Halt()
	_ = s.fetch.Close()
	if err := s.fabric.close(); err != nil {
		s.log.Warn("RDMA device", "err", err)
	}
	s.mu.Lock()
	for c := range s.conns {
		_ = c.c.Close()
	}
	s.mu.Unlock()
}

func (s *server) quit() { s.once.Do(func() { close(s.done) }) }

func (s *server) accept() {
	for {
		u, err := s.sock.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.log.Error("control socket", "err", err)
			}
			return
		}
		c := newConn(u)
		s.mu.Lock()
		s.conns[c] = true
		s.mu.Unlock()
		go s.serve(c)
	}
}

// serve answers one control connection until it ends.
func (s *server) serve(c *conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.c.Close()
	}()
	for {
		p, files, err := c.recv()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("control connection", "err", err)
			}
			return
		}
		go func() {
			defer closeAll(files)
			body, err := s.handle(p, files)
			r := packet{ID: p.ID, Op: opReply}
			if err != nil {
				r.Err, r.Code, body = err.Error(), codeOf(err), nil
			}
			_ = c.send(r, body) // a client that is gone has no use for it
			if p.Op == opFinish && err == nil {
				s.quit()
			}
		}()
	}
}

// finish leaves plain memory behind and ends the keeper; the pager ends after
// the answer.
func (s *server) finish() error {
	s.mu.Lock()
	if s.leaving {
		s.mu.Unlock()
		return errors.New("pager: finishing already")
	}
	if n := s.store.Missing(true); n != 0 {
		s.mu.Unlock()
		return fmt.Errorf("pager: %d pages are missing", n)
	}
	s.leaving = true
	me := s.me
	s.mu.Unlock()
	if err := s.unshow(); err != nil {
		s.log.Warn("what was shown of the process", "err", err)
	}
	s.trap.Halt()
	if err := s.trap.Leave(); err != nil {
		return err
	}
	_ = s.fetch.Close()
	_ = os.Remove(filepath.Join(s.cfg.Dir, socketName))
	_ = os.Remove(filepath.Join(s.cfg.Dir, stateName))
	_ = unix.Kill(me.Keeper, unix.SIGKILL) // our child, not waited for yet: the pid is its own
	return nil
}

// free lets go of the process's memory, and goes on showing the source's.
func (s *server) free() error {
	if n := s.store.Missing(true); n != 0 {
		return fmt.Errorf("pager: %d pages are missing", n)
	}
	s.unveilAll()
	s.trap.Halt()
	return s.trap.Leave()
}

// abandon ends a pager that never got anything to serve and whose daemon is
// gone.
func (s *server) abandon() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for alone := 0; alone < 5; {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		if len(s.conns) == 0 && len(s.store.Spaces()) == 0 && len(s.store.Sources()) == 0 {
			alone++
		} else {
			alone = 0
		}
		s.mu.Unlock()
	}
	s.log.Warn("nothing to serve and no daemon: ending")
	s.mu.Lock()
	s.leaving = true
	me := s.me
	s.mu.Unlock()
	_ = os.Remove(filepath.Join(s.cfg.Dir, socketName))
	_ = os.Remove(filepath.Join(s.cfg.Dir, stateName))
	_ = unix.Kill(me.Keeper, unix.SIGKILL)
	s.quit()
}
