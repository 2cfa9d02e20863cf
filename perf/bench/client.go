package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pageferry/pageferry/appliance/lab"
)

const clientArg0 = "pageferry-bench-client"

// clientSetup is what the client is told, as JSON in its argument.
type clientSetup struct {
	Addresses []string      `json:"addresses"` // of the service, one of which answers
	Keys      int           `json:"keys"`      // "key:0" and on hold valueBytes each
	Pause     time.Duration `json:"pause"`     // between an answer and the next request
}

// ClientReport is what a client saw since its last report.
type ClientReport struct {
	// Gap is the longest time between two answers, the one that has not ended
	// yet included.
	Gap        time.Duration `json:"gap"`
	Answers    int           `json:"answers"`
	Reconnects int           `json:"reconnects"`
	Wrong      string        `json:"wrong"` // what should not have been, if anything
}

// Client is a redis client on the third host, which writes a key of its own and
// reads any of the others in turn, one request at a time.
type Client struct {
	in   *os.File
	out  *bufio.Reader
	outF *os.File
	prog *lab.Program
}

// clientPause leaves the processors to others most of the time, and is how fine
// gaps are seen.
const clientPause = 200 * time.Microsecond

// NewClient starts a client of the redis-server that Redis has started. Close
// ends it.
func (s *Stage) NewClient(keys int) (*Client, error) {
	a, b := s.Hosts()
	setup, err := json.Marshal(clientSetup{
		Addresses: []string{redisAddress(a.Addr().String()), redisAddress(b.Addr().String())}, Keys: keys, Pause: clientPause,
	})
	if err != nil {
		return nil, err
	}
	p, err := s.startPiped(s.lab.Host(hostClient), "client", clientArg0, string(setup))
	if err != nil {
		return nil, err
	}
	return &Client{in: p.in, outF: p.out, out: bufio.NewReader(p.out), prog: p.prog}, nil
}

// Take asks the client what it saw since the last call.
func (c *Client) Take() (r ClientReport, err error) {
	if _, err := c.in.WriteString("take\n"); err != nil {
		return r, fmt.Errorf("client: %w", err)
	}
	if err := c.outF.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return r, fmt.Errorf("client: %w", err)
	}
	line, err := c.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err == nil && r.Wrong != "" {
		err = errors.New(r.Wrong)
	}
	if err != nil {
		return r, fmt.Errorf("client: %w", err)
	}
	return r, nil
}

// Close ends the client and waits for it.
func (c *Client) Close() error {
	err := c.in.Close()
	if werr := c.prog.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("client: %w", werr))
	}
	return errors.Join(err, c.outF.Close())
}

// runClient is the client's process.
func runClient(arg string) error {
	c := &client{}
	if err := json.Unmarshal([]byte(arg), &c.setup); err != nil {
		return err
	}
	go c.work()
	enc := json.NewEncoder(os.Stdout)
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		if err := enc.Encode(c.take()); err != nil {
			return err
		}
	}
	return nil // whoever asks has gone
}

type client struct {
	setup clientSetup
	at    int // the address that answered last

	mu     sync.Mutex
	report ClientReport
	last   time.Time // of the last answer
}

func (c *client) take() ClientReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.report
	now := time.Now()
	if !c.last.IsZero() {
		r.Gap = max(r.Gap, now.Sub(c.last))
	}
	c.report, c.last = ClientReport{Wrong: r.Wrong}, now
	return r
}

func (c *client) answered() {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.last.IsZero() {
		c.report.Gap = max(c.report.Gap, now.Sub(c.last))
	}
	c.last = now
	c.report.Answers++
}

func (c *client) work() {
	value := strings.Repeat("v", 100)
	for {
		conn := c.connect()
		for err := error(nil); err == nil; {
			if err = c.turn(conn, value); err == nil {
				c.answered()
				time.Sleep(c.setup.Pause)
			}
		}
		conn.Close()
	}
}

// turn is one request.
func (c *client) turn(conn *redisConn, value string) error {
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	var err error
	var got []byte
	if n := rand.IntN(2 * c.setup.Keys); n < c.setup.Keys {
		got, err = conn.do("GET", fmt.Sprintf("key:%d", n))
		if err == nil && len(got) != valueBytes {
			c.wrong(fmt.Sprintf("key:%d has %d bytes, not %d", n, len(got), valueBytes))
		}
	} else {
		_, err = conn.do("SET", "own", value)
	}
	var se serverError
	if errors.As(err, &se) {
		c.wrong(err.Error())
		return nil
	}
	return err
}

func (c *client) wrong(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Wrong = what
}

// connect tries the addresses in turn until one takes it.
func (c *client) connect() *redisConn {
	for {
		for range c.setup.Addresses {
			nc, err := net.DialTimeout("tcp", c.setup.Addresses[c.at], time.Second)
			if err == nil {
				c.mu.Lock()
				c.report.Reconnects++
				c.mu.Unlock()
				return newRedisConn(nc)
			}
			c.at = (c.at + 1) % len(c.setup.Addresses)
		}
		time.Sleep(c.setup.Pause)
	}
}
