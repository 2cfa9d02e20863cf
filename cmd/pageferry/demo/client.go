package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	keysPerClient = 500
	// answerLimit is how long an answer may take before the client takes the
	// connection for broken. A service that moves answers much sooner.
	answerLimit = 5 * time.Second
)

type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// client writes to its own keys, reads them back, and remembers.
type client struct {
	id        int
	dial      dialer
	addresses []string // of the service, one of which answers
	at        int      // the one that answered last

	conn *conn
	next uint64
	keys [keysPerClient]key

	mu      sync.Mutex
	stats   clientStats
	lastAck time.Time
	hop     clientStats // since the last call of takeHop
}

// key is what the client knows of one: the value that was acknowledged, and the
// one that was sent without an answer, if any.
type key struct {
	acked, sent uint64
	unsure      bool
}

type clientStats struct {
	writes, reads, reconnects uint64
	gap                       time.Duration // longest between two acknowledged writes
}

// wrongError is data that is not what it must be: what the demo is there to not
// find.
type wrongError struct{ msg string }

func (e *wrongError) Error() string { return e.msg }

func (c *client) name(i int) string { return fmt.Sprintf("demo:%d:%d", c.id, i) }

// value is long enough to spread over more than one allocation, and says where
// it belongs.
func (c *client) value(i int, n uint64) string {
	return fmt.Sprintf("%s=%d;%s", c.name(i), n, strings.Repeat(strconv.FormatUint(n%10, 10), 100))
}

// run writes and checks until ctx ends. It returns an error for wrong data, and
// for a service that nobody offers any more.
func (c *client) run(ctx context.Context) error {
	defer c.hangUp()
	for ctx.Err() == nil {
		c.next++
		i := int(c.next % keysPerClient)
		err := c.write(ctx, i, c.next)
		if err == nil && c.next%4 == 0 {
			err = c.check(ctx, int((c.next*7919)%keysPerClient))
		}
		var wrong *wrongError
		if errors.As(err, &wrong) || (err != nil && ctx.Err() == nil) {
			return fmt.Errorf("client %d: %w", c.id, err)
		}
	}
	return nil
}

func (c *client) hangUp() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// ask sends a command until it is answered, connecting anew where needed. sent
// is called before every attempt.
func (c *client) ask(ctx context.Context, sent func(), args ...string) (string, error) {
	for {
		if err := c.connect(ctx); err != nil {
			return "", err
		}
		if sent != nil {
			sent()
		}
		_ = c.conn.SetDeadline(time.Now().Add(answerLimit))
		answer, err := c.conn.do(args...)
		var se serverError
		if err == nil || errors.Is(err, errNil) || (errors.As(err, &se) && !strings.HasPrefix(string(se), "LOADING")) {
			return answer, err
		}
		c.hangUp()
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
}

// connect tries the addresses in turn until one takes it.
func (c *client) connect(ctx context.Context) error {
	if c.conn != nil {
		return nil
	}
	const patience = 60 * time.Second
	deadline := time.Now().Add(patience)
	for {
		for range c.addresses {
			one, cancel := context.WithTimeout(ctx, time.Second)
			nc, err := c.dial(one, "tcp", c.addresses[c.at])
			cancel()
			if err == nil {
				c.conn = newConn(nc)
				c.mu.Lock()
				c.stats.reconnects++
				c.hop.reconnects++
				c.mu.Unlock()
				return nil
			}
			c.at = (c.at + 1) % len(c.addresses)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("nobody has offered the service for %v", patience)
		}
		select {
		case <-time.After(500 * time.Microsecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *client) write(ctx context.Context, i int, n uint64) error {
	k := &c.keys[i]
	answer, err := c.ask(ctx, func() { k.sent, k.unsure = n, true }, "SET", c.name(i), c.value(i, n))
	if err != nil {
		return err
	}
	if answer != "OK" {
		return &wrongError{fmt.Sprintf("SET %s answered %q", c.name(i), answer)}
	}
	k.acked, k.unsure = n, false
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.writes++
	c.hop.writes++
	if !c.lastAck.IsZero() {
		gap := now.Sub(c.lastAck)
		c.stats.gap, c.hop.gap = max(c.stats.gap, gap), max(c.hop.gap, gap)
	}
	c.lastAck = now
	return nil
}

// check reads a key and compares.
func (c *client) check(ctx context.Context, i int) error {
	k := &c.keys[i]
	got, err := c.ask(ctx, nil, "GET", c.name(i))
	if errors.Is(err, errNil) {
		if k.acked == 0 {
			return nil
		}
		return &wrongError{fmt.Sprintf("acknowledged write lost: %s is gone, should be %d", c.name(i), k.acked)}
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.stats.reads++
	c.hop.reads++
	c.mu.Unlock()
	if k.acked != 0 && got == c.value(i, k.acked) {
		return nil
	}
	if k.unsure && got == c.value(i, k.sent) {
		return nil
	}
	return &wrongError{fmt.Sprintf("acknowledged write lost: %s holds %.40q, should be %d", c.name(i), got, k.acked)}
}

// checkAll reads every key that was ever acknowledged.
func (c *client) checkAll(ctx context.Context) (keys int, err error) {
	defer c.hangUp()
	for i := range c.keys {
		if c.keys[i].acked == 0 {
			continue
		}
		if err := c.check(ctx, i); err != nil {
			return keys, fmt.Errorf("client %d: %w", c.id, err)
		}
		keys++
	}
	return keys, nil
}

// takeHop returns what was counted since the last call.
func (c *client) takeHop() clientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.hop
	c.hop = clientStats{}
	return s
}
