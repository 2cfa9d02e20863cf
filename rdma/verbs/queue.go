package verbs

import (
	"fmt"
	"syscall"
	"time"
)

// CQ is a completion queue with a channel to sleep on.
type CQ struct {
	b           binding
	channel, cq uintptr
	wake        *waiter
}

// NewCQ makes a completion queue of at least n entries.
func (d *Device) NewCQ(n int) (*CQ, error) {
	ch, cq, fd, errno := d.b.cqCreate(d.ctx, n)
	if errno != 0 {
		return nil, failed(fmt.Sprintf("completion queue of %d on %s", n, d.name), errno)
	}
	w, err := newWaiter(fd, d.name+" completions")
	if err != nil {
		d.b.cqDestroy(ch, cq)
		return nil, err
	}
	return &CQ{d.b, ch, cq, w}, nil
}

// Poll fills c with what has completed and returns how much that is. If it is
// nothing it tries again until d, at most a second, has passed, all in one call into
// C: other goroutines run meanwhile, but on other threads.
func (q *CQ) Poll(c []Completion, d time.Duration) (int, error) {
	n := q.b.cqPoll(q.cq, c, uint32(min(d, time.Second)))
	if n < 0 {
		return 0, failed("poll", syscall.EIO)
	}
	return n, nil
}

// Arm makes Wait return for the next completion. What completed before it is
// not reported: poll once more after.
func (q *CQ) Arm() error { return failed("arm", q.b.cqArm(q.cq)) }

// Wait sleeps until a completion came after Arm. It may be called while others
// use the queue, and ends with os.ErrClosed on StopWaiting.
func (q *CQ) Wait() error {
	var errno syscall.Errno
	err := q.wake.wait(func() bool {
		_, errno = q.b.cqEvents(q.channel)
		return errno != syscall.EAGAIN
	})
	if err != nil {
		return err
	}
	return failed("completion channel", errno)
}

// StopWaiting makes Wait return. Idempotent.
func (q *CQ) StopWaiting() { q.wake.close() }

// Close destroys the queue. Wait must have returned and its queue pairs be gone.
func (q *CQ) Close() error {
	q.wake.close()
	return failed("destroy completion queue", q.b.cqDestroy(q.channel, q.cq))
}

// QP is a reliable connected queue pair.
type QP struct {
	b   binding
	qp  uintptr
	QPN uint32
}

// NewQP makes a queue pair that reports to cq and takes up to sends and recvs
// work requests at a time. It can be posted to for receiving at once.
func (d *Device) NewQP(cq *CQ, sends, recvs, port int) (*QP, error) {
	qp, qpn, errno := d.b.qpCreate(d.pd, cq.cq, sends, recvs, port)
	if errno != 0 {
		return nil, failed(fmt.Sprintf("queue pair of %d and %d requests on %s", sends, recvs, d.name), errno)
	}
	return &QP{d.b, qp, qpn}, nil
}

// Handle is what Event says of a queue pair.
func (q *QP) Handle() uintptr { return q.qp }

// Connect connects the queue pair to its peer (INIT to RTR to RTS).
func (q *QP) Connect(p *Peer) error { return failed("connect queue pair", q.b.qpConnect(q.qp, p)) }

// PostSend posts a chain of requests in order. After an error the queue pair
// cannot be relied on.
func (q *QP) PostSend(w []WorkRequest) error {
	if len(w) == 0 {
		return nil
	}
	n, errno := q.b.postSend(q.qp, w)
	if errno != 0 {
		return failed(fmt.Sprintf("post request %d of %d", n, len(w)), errno)
	}
	return nil
}

// PostRecv posts a chain of receive requests. See PostSend.
func (q *QP) PostRecv(w []WorkRequest) error {
	if len(w) == 0 {
		return nil
	}
	n, errno := q.b.postRecv(q.qp, w)
	if errno != 0 {
		return failed(fmt.Sprintf("post receive %d of %d", n, len(w)), errno)
	}
	return nil
}

// Close destroys the queue pair. When it returns the device touches none of the
// memory of its requests any more; completions that were not polled are lost.
func (q *QP) Close() error { return failed("destroy queue pair", q.b.qpDestroy(q.qp)) }
