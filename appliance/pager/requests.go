package pager

import (
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/pagestore"
)

// handle does one request. The files are closed afterwards.
func (s *server) handle(p packet, files []*os.File) (body any, err error) {
	switch p.Op {
	case opAdopt, opLand, opShow, opVeiled, opUnveil, opReplaced, opFetch, opPoison, opFinish:
		select {
		case <-s.whole:
		case <-s.ctx.Done():
			return nil, ErrGone
		}
	}
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
		if err := s.fabric.drop(); err != nil {
			s.log.Warn("RDMA device", "err", err)
		}
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
	case opLand:
		m, err := decode[landMsg](p)
		if err != nil || len(files) != 1 {
			return nil, errors.Join(err, wantFiles(p, files, 1))
		}
		return s.land(m, files[0])
	case opShow:
		m, err := decode[Show](p)
		if err != nil {
			return nil, err
		}
		return nil, s.show(m)
	case opVeiled:
		m, err := decode[veiledMsg](p)
		if err != nil {
			return nil, err
		}
		return s.veiledNow(m)
	case opUnveil:
		m, err := decode[unveilMsg](p)
		if err != nil {
			return nil, err
		}
		return s.unveil(m)
	case opReplaced:
		m, err := decode[replacedMsg](p)
		if err != nil {
			return nil, err
		}
		return nil, s.replaced(m)
	case opShown:
		return s.whatIsShown(), nil
	case opHold:
		m, err := decode[holdMsg](p)
		if err != nil {
			return nil, err
		}
		return nil, s.hold(m)
	case opRead:
		m, err := decode[readMsg](p)
		if err != nil {
			return nil, err
		}
		return s.read(m)
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
	case opFree:
		return nil, s.free()
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
