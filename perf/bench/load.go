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
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/appliance/lab"
)

const loadArg0 = "pageferry-bench-load"

type loadSetup struct {
	Address     string `json:"address"`
	Keys        int    `json:"keys"`
	Connections int    `json:"connections"`
}

// Load is many clients at once of a redis-server on the first host, from the third:
// each sends a request, waits for its answer, and sends the next, as memtier_benchmark
// does by default. One of eleven is a SET of a whole value, the others are GETs, all
// of random keys.
type Load struct {
	in   *os.File
	outF *os.File
	out  *bufio.Reader
	prog *lab.Program
}

// loadConnections is as many as one thread of memtier_benchmark has.
const loadConnections = 50

// NewLoad starts a load on the redis-server that Redis has started, which must not
// move. Close ends it.
func (s *Stage) NewLoad(keys int) (*Load, error) {
	a, _ := s.Hosts()
	setup, err := json.Marshal(loadSetup{Address: redisAddress(a.Addr().String()), Keys: keys, Connections: loadConnections})
	if err != nil {
		return nil, err
	}
	p, err := s.startPiped(s.lab.Host(hostClient), "load", loadArg0, string(setup))
	if err != nil {
		return nil, err
	}
	return &Load{in: p.in, outF: p.out, out: bufio.NewReader(p.out), prog: p.prog}, nil
}

// Answers is how many have come so far.
func (l *Load) Answers() (n uint64, err error) {
	if _, err := l.in.WriteString("answers\n"); err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	if err := l.outF.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	line, err := l.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &n)
	}
	if err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	return n, nil
}

// Rate is answers per second while f runs.
func (l *Load) Rate(f func() error) (float64, error) {
	before, err := l.Answers()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := f(); err != nil {
		return 0, err
	}
	after, err := l.Answers()
	return float64(after-before) / time.Since(began).Seconds(), err
}

// Close ends the load and waits for it.
func (l *Load) Close() error {
	err := l.in.Close()
	if werr := l.prog.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("load: %w", werr))
	}
	return errors.Join(err, l.outF.Close())
}

// runLoad is the load's process. It ends with whoever asks, and with a connection
// that fails.
func runLoad(arg string) error {
	var setup loadSetup
	if err := json.Unmarshal([]byte(arg), &setup); err != nil {
		return err
	}
	var answers atomic.Uint64
	for range setup.Connections {
		nc, err := net.Dial("tcp", setup.Address)
		if err != nil {
			return err
		}
		go func() {
			c := newRedisConn(nc)
			value := strings.Repeat("w", valueBytes)
			for {
				key := fmt.Sprintf("key:%d", rand.IntN(setup.Keys))
				args := []string{"GET", key}
				if rand.IntN(11) == 0 {
					args = []string{"SET", key, value}
				}
				if _, err := c.do(args...); err != nil {
					fmt.Fprintln(os.Stderr, "load:", err)
					os.Exit(1)
				}
				answers.Add(1)
			}
		}()
	}
	enc := json.NewEncoder(os.Stdout)
	for sc := bufio.NewScanner(os.Stdin); sc.Scan(); {
		if err := enc.Encode(answers.Load()); err != nil {
			return err
		}
	}
	return nil
}
