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
	"time"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// server is the pager's process.
type server struct {
	cfg   settings
	log   *slog.Logger
	store *pagestore.Store
	trap  *fault.Trap
	fetch *stream.Fetcher
	pool  *transport.Pool
	sock  *net.UnixListener

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
	lost    error // every page lane refused because the source's pages are gone
}

// run is the life of a pager: c is its first control connection.
func run(c *conn, keeper int, log *slog.Logger) error {
	s := &server{
		log: log, done: make(chan struct{}), conns: map[*conn]bool{},
		eager: make(chan struct{}), all: make(chan struct{}),
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
	// A lane holds one buffer at a time; lanes of two epochs may overlap.
	if s.pool, err = transport.NewPool(2*(s.cfg.BulkLanes+2), payloadSize); err != nil {
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
		Store: s.store, Placer: s.trap, Window: s.cfg.Window, Chunk: s.cfg.Chunk, StallTimeout: s.cfg.StallTimeout,
		Waiting: s.trap.Waiting, Log: s.log,
		OnUrgent:   func() { fault.RaisePriority(s.log) },
		OnLost:     s.laneLost,
		OnEager:    func() { s.settled(&s.eager, EagerDone) },
		OnResident: func() { s.settled(&s.all, Resident) },
	})
	if s.cfg.OldKeeper != 0 {
		if err := s.takeOver(); err != nil {
			return err
		}
	}
	start, err := startTime(os.Getpid())
	if err != nil {
		return fmt.Errorf("pager: own start time: %w", err)
	}
	kstart, err := startTime(keeper)
	if err != nil {
		return fmt.Errorf("pager: keeper's start time: %w", err)
	}
	s.me = who{s.cfg.ID, os.Getpid(), start, keeper, kstart}
	path := filepath.Join(s.cfg.Dir, socketName)
	_ = os.Remove(path) // of a pager that was killed
	if s.sock, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"}); err != nil {
		return fmt.Errorf("pager: listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("pager: socket: %w", err)
	}
	if err := writeState(s.cfg.Dir, s.me); err != nil {
		return err
	}
	go func() {
		if err := s.trap.Run(); err != nil {
			s.log.Error("the trap has ended: faults are not answered any more", "err", err)
		}
	}()
	if s.cfg.OldKeeper != 0 {
		s.fetch.Start(s.store.Flag(pagestore.FlagFetching))
	}
	return nil
}

// payloadSize is the largest payload that a lane takes, in bytes.
const payloadSize = 256 << 10

// end undoes begin. The keeper is dead or none of its business any more.
func (s *server) end() {
	s.cancel()
	_ = s.sock.Close()
	s.trap.Halt()
	_ = s.fetch.Close()
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

// handle does one request. The files are closed afterwards.
func (s *server) handle(p packet, files []*os.File) (body any, err error) {
	switch p.Op {
	case opWho:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.me, nil
	case opLane:
		m, err := decode[laneMsg](p)
		if err != nil || len(files) != 1 {
			return nil, errors.Join(err, wantFiles(p, files, 1))
		}
		return nil, s.lane(m, files[0])
	case opEpoch:
		m, err := decode[epochMsg](p)
		if err != nil {
			return nil, err
		}
		s.store.SetEpoch(m.Epoch)
		s.fetch.DropLanes()
		return nil, nil
	case opFile:
		m, err := decode[fileMsg](p)
		if err != nil || len(files) != 1 {
			return nil, errors.Join(err, wantFiles(p, files, 1))
		}
		return nil, s.file(m, files[0])
	case opAdopt:
		m, err := decode[adoptMsg](p)
		if err != nil {
			return nil, err
		}
		return nil, s.adopt(m, p, files)
	case opFetch:
		s.store.SetFlag(pagestore.FlagFetching)
		s.fetch.Start(true)
		return nil, nil
	case opWaitEager:
		return nil, s.await(&s.eager)
	case opWaitResident:
		return nil, s.await(&s.all)
	case opStats:
		return s.stats(), nil
	case opPoison:
		return nil, s.trap.Poison()
	case opFinish:
		return nil, s.finish()
	}
	return nil, fmt.Errorf("pager: unknown request %q", p.Op)
}

func wantFiles(p packet, files []*os.File, n int) error {
	if len(files) == n {
		return nil
	}
	return fmt.Errorf("pager: %s with %d descriptors, want %d", p.Op, len(files), n)
}

// await waits until the channel that ch points to is closed.
func (s *server) await(ch *chan struct{}) error {
	s.mu.Lock()
	c := *ch
	s.mu.Unlock()
	select {
	case <-c:
		if s.store.Flag(pagestore.FlagPoisoned) {
			return ErrLost
		}
		return nil
	case <-s.ctx.Done():
		return ErrGone
	}
}

// settled closes the channel and tells the clients.
func (s *server) settled(ch *chan struct{}, kind EventKind) {
	s.mu.Lock()
	select {
	case <-*ch:
	default:
		close(*ch)
	}
	s.mu.Unlock()
	s.tell(eventMsg{Kind: kind, Stats: s.stats()})
}

// adopt takes up an address space.
func (s *server) adopt(m adoptMsg, p packet, files []*os.File) error {
	n := 0
	if m.UFFD {
		n++
	}
	if m.Mem {
		n++
	}
	if err := wantFiles(p, files, n); err != nil {
		return err
	}
	segs := make([]pagestore.Segment, len(m.Regions))
	for i, r := range m.Regions {
		segs[i] = pagestore.Segment{Dst: r.Range, Src: r.Range.Start}
		switch {
		case r.Kind == Written && !m.Mem:
			return fmt.Errorf("pager: region %v is to be written, and there is no memory file", r.Range)
		case r.Kind == Trapped && !m.UFFD:
			return fmt.Errorf("pager: region %v is trapped, and there is no userfaultfd", r.Range)
		case r.Kind == Written:
			segs[i].Flags |= pagestore.Written
		case r.Kind != Trapped:
			return fmt.Errorf("pager: region %v of kind %d", r.Range, r.Kind)
		}
		if r.Shared {
			segs[i].Flags |= pagestore.Shared
		}
	}
	if err := covered(m); err != nil {
		return err
	}
	// Numbers that a pager which takes over can keep.
	fds := []int{-1, -1}
	for i, has := range []bool{m.UFFD, m.Mem} {
		if !has {
			continue
		}
		fd, err := dupHigh(files[0])
		if err != nil {
			return err
		}
		defer func() {
			if fds[i] >= 0 {
				unix.Close(fds[i])
			}
		}()
		fds[i], files = fd, files[1:]
	}
	if m.UFFD {
		// A blocking descriptor would hold up all the others.
		if err := unix.SetNonblock(fds[0], true); err != nil {
			return fmt.Errorf("pager: userfaultfd: %w", err)
		}
	}
	src, err := s.store.AddSource(m.Space, page.NewSet(m.Lazy...), page.NewSet(m.Eager...), page.NewSet(m.Hot...))
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.eager, s.all = make(chan struct{}), make(chan struct{})
	s.mu.Unlock()
	if _, err = s.store.AddSpace(src, m.PID, fds[0], fds[1], segs); err != nil {
		return err
	}
	fds[0], fds[1] = -1, -1
	s.trap.Kick()
	s.fetch.Start(s.store.Flag(pagestore.FlagFetching))
	return nil
}

// covered checks that every page has a region, lazy ones a trapped one.
func covered(m adoptMsg) error {
	var trapped, all page.Set
	for _, r := range m.Regions {
		all.Add(r.Range)
		if r.Kind == Trapped {
			trapped.Add(r.Range)
		}
	}
	for _, c := range []struct {
		what string
		rs   []page.Range
		in   *page.Set
	}{{"lazy", m.Lazy, &trapped}, {"eager", m.Eager, &all}} {
		for _, r := range c.rs {
			if g := c.in.Gaps(r); len(g) > 0 {
				return fmt.Errorf("pager: space %d: %s pages %v have no region to go to", m.Space, c.what, g[0])
			}
		}
	}
	return nil
}

func dupHigh(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("pager: descriptor: %w", err)
	}
	fd, dupErr := -1, error(nil)
	if err := rc.Control(func(p uintptr) { fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, fault.FirstFD) }); err != nil {
		return -1, fmt.Errorf("pager: descriptor: %w", err)
	}
	if dupErr != nil {
		return -1, fmt.Errorf("pager: copy descriptor: %w", dupErr)
	}
	return fd, nil
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

// guardKeeper starts another keeper when ours dies.
func (s *server) guardKeeper(pid int) {
	for {
		var ws unix.WaitStatus
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		s.mu.Lock()
		if s.leaving || s.ctx.Err() != nil {
			s.mu.Unlock()
			return
		}
		s.log.Warn("keeper died, starting another", "pid", pid, "status", ws)
		pid, err = cloneKeeper(s.cfg.ID.String())
		if err == nil {
			s.me.Keeper = pid
			s.me.KeeperStart, _ = startTime(pid)
			if s.cfg.KeeperCgroup != "" {
				_ = os.WriteFile(filepath.Join(s.cfg.KeeperCgroup, "cgroup.procs"), fmt.Appendf(nil, "%d", pid), 0)
			}
			err = writeState(s.cfg.Dir, s.me)
		}
		me := s.me
		s.mu.Unlock()
		if err != nil {
			s.log.Error("no keeper: a kill of the pager would lose memory", "err", err)
			if pid == 0 {
				return
			}
		}
		s.tell(eventMsg{Kind: keeperChanged, Stats: Stats{Faults: uint64(me.Keeper)}})
	}
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
