package migrate

import (
	"fmt"
	"sync"

	"github.com/pageferry/pageferry/transport"
)

// link is a connection of the control lane between the two daemons.
type link struct {
	ends [2]*fakeLane // source, destination

	mu      sync.Mutex
	stalled bool
}

// fakeLane is one end of it.
type fakeLane struct {
	k      *link
	l      *life
	other  *fakeLane
	in     chan transport.Frame
	once   sync.Once
	closed chan struct{} // this end is
	broken chan struct{} // the connection is: nothing in flight arrives
}

func newLink(src, dst *life) *link {
	k := &link{}
	broken := make(chan struct{})
	for i, l := range []*life{src, dst} {
		k.ends[i] = &fakeLane{k: k, l: l, in: make(chan transport.Frame, 1024), closed: make(chan struct{}), broken: broken}
	}
	k.ends[0].other, k.ends[1].other = k.ends[1], k.ends[0]
	return k
}

// end closes the end of a daemon that died; what it sent still arrives.
func (k *link) end(r Role) {
	if r == RoleSource {
		k.ends[0].Close()
	} else {
		k.ends[1].Close()
	}
}

// cut loses what is in flight, and both ends learn of it.
func (k *link) cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.ends[0].broken:
	default:
		close(k.ends[0].broken)
	}
}

// stall loses all that is sent from now on, and nobody learns of it.
func (k *link) stall() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.stalled = true
}

func (f *fakeLane) ID() transport.LaneID {
	return transport.LaneID{Kind: transport.Control}
}

func (f *fakeLane) Send(frames ...transport.Frame) error {
	f.l.here()
	for _, fr := range frames {
		select {
		case <-f.closed:
			fr.Payload.Release()
			return transport.ErrClosed
		case <-f.broken:
			fr.Payload.Release()
			return fmt.Errorf("%w: cut", transport.ErrPeer)
		case <-f.other.closed:
			fr.Payload.Release()
			return fmt.Errorf("%w: closed", transport.ErrPeer)
		default:
		}
		f.k.mu.Lock()
		stalled := f.k.stalled
		f.k.mu.Unlock()
		if stalled {
			fr.Payload.Release()
			continue
		}
		fr.Meta = append([]byte(nil), fr.Meta...)
		f.other.in <- fr // never full: the peer reads all the time
	}
	return nil
}

func (f *fakeLane) Recv() (transport.Frame, error) {
	select {
	case <-f.broken:
		return transport.Frame{}, fmt.Errorf("%w: cut", transport.ErrPeer)
	default:
	}
	select {
	case fr := <-f.in:
		return fr, nil
	default:
	}
	select {
	case fr := <-f.in:
		return fr, nil
	case <-f.closed:
		return transport.Frame{}, transport.ErrClosed
	case <-f.broken:
		return transport.Frame{}, fmt.Errorf("%w: cut", transport.ErrPeer)
	case <-f.other.closed:
		select {
		case fr := <-f.in:
			return fr, nil
		default:
			return transport.Frame{}, fmt.Errorf("%w: closed", transport.ErrPeer)
		}
	}
}

func (f *fakeLane) Close() error {
	f.once.Do(func() {
		close(f.closed)
		for {
			select {
			case fr := <-f.in:
				fr.Payload.Release()
			default:
				return
			}
		}
	})
	return nil
}

func (f *fakeLane) Stats() transport.Stats { return transport.Stats{} }
