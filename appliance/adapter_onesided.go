package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
)

// registrar is a frozen process that registers its own memory; checkpoint.Session is one.
type registrar interface {
	Register(ctx context.Context, d checkpoint.Domain, pages page.Set) (checkpoint.Registration, error)
}

// oneSided is what the source's lanes are to a process: they let the destination read
// its memory without it, and without this daemon.
type oneSided interface {
	// frozen has pages of the process registered, where the lanes go over RDMA, and
	// offered to the destination. The process must stay frozen until thaw.
	frozen(ctx context.Context, p registrar, pages page.Set)
	// thaw ends that: the process may run after it. Idempotent.
	thaw() error
}

var _ oneSided = (*lanes)(nil)

// mostPinned bounds what is pinned, and the time that it takes, which can be downtime.
const mostPinned = 4 << 30

func (l *lanes) frozen(ctx context.Context, p registrar, pages page.Set) {
	l.mu.Lock()
	d := l.device()
	l.mu.Unlock()
	if d == nil || pages.Empty() {
		return
	}
	begin := time.Now()
	offer, told, err := []transport.Remote(nil), "", l.mustCopy()
	if err == nil {
		offer, told, err = l.register(ctx, d, p, pages)
	}
	if err != nil {
		told = fmt.Sprintf("pages are copied at the source, as %v", err)
	}
	l.log.Debug("registered memory of the process", "ranges", len(offer), "took", time.Since(begin), "told", told)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.device() != d {
		return // it was closed meanwhile, and everything with it
	}
	l.offer = offer
	if l.opts.OnTransport != nil {
		name, remark := l.carry.told(l.opts.Transport)
		l.opts.OnTransport(name, remark+"; "+told)
	}
	l.offerAll()
}

// mustCopy is why what was asked for takes a program at the source: the destination
// reads as fast as it can, and what there is.
func (l *lanes) mustCopy() error {
	switch {
	case l.opts.Limiter != nil:
		return errors.New("the bandwidth is limited there")
	case l.opts.Compress == codec.Always:
		return errors.New("they are compressed there")
	}
	return nil
}

// register has pages registered with d and says how much that was.
func (l *lanes) register(ctx context.Context, d *rdma.Device, p registrar, pages page.Set) ([]transport.Remote, string, error) {
	if n := pages.Bytes(); n > mostPinned {
		return nil, "", fmt.Errorf("%s are too many to pin", mib(n))
	}
	loan, err := d.Lend()
	if err != nil {
		return nil, "", err
	}
	defer loan.File.Close()
	reg, err := p.Register(ctx, checkpoint.Domain{File: loan.File, Driver: loan.Driver, ID: loan.Domain, MaxRegions: loan.MaxRegions / 2}, pages)
	if err != nil {
		return nil, "", err
	}
	var offer []transport.Remote
	var bytes uint64
	for _, r := range reg.Regions {
		if _, err := d.Adopt(r.Range, r.Handle, r.Key); err != nil {
			return nil, "", err
		}
		offer = append(offer, transport.Remote{Range: r.Range, Key: r.Key})
		bytes += r.Bytes()
	}
	told := fmt.Sprintf("%s of its memory are read one-sided, %s are copied", mib(bytes), mib(reg.Left.Bytes()))
	if len(reg.Refused) > 0 {
		told += fmt.Sprintf(" (%v was refused: %v)", reg.Refused[0].Range, reg.Refused[0].Err)
	}
	return offer, told, nil
}

// offerAll tells the destination on all lanes that have not told it; caller holds mu.
func (l *lanes) offerAll() {
	if len(l.offer) == 0 || l.now == nil {
		return
	}
	for _, lane := range l.now.lanes {
		o, ok := lane.(transport.RemoteOfferer)
		if !ok {
			continue
		}
		if err := o.Offer(slices.Clone(l.offer)); err != nil {
			l.log.Debug("offering memory", "err", err) // the lane's end says so, too
		}
	}
}

// thaw deregisters. The lanes go with it: the destination may be reading.
func (l *lanes) thaw() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.offer) == 0 {
		return nil
	}
	l.offer = nil
	l.end()
	return l.carry.device.Revoke()
}

// pinning is the registering that goes on beside a handover.
type pinning struct {
	onFrozen oneSided
	done     chan struct{} // of the last; nil where there was none
}

// pin begins to have the memory registered that the destination will ask for.
func (p *process) pin(mem []migrate.Memory) {
	if p.onFrozen == nil {
		return
	}
	var pages page.Set
	for i := range mem {
		if m := &mem[i]; m.Space == 0 {
			pages = page.Union(&m.Lazy, &m.Eager)
			if !m.Dirty.Empty() { // the others are there
				pages = m.Dirty
			}
		}
	}
	done := make(chan struct{})
	p.done = done
	go func() {
		defer close(done)
		p.onFrozen.frozen(context.Background(), p.s, pages)
	}()
}

// pinned waits until registering is over.
func (p *process) pinned() {
	if p.done != nil {
		<-p.done
	}
}

// unpin is for before the process runs again, or ends.
func (p *process) unpin() error {
	p.pinned()
	if p.onFrozen == nil {
		return nil
	}
	return p.onFrozen.thaw()
}
