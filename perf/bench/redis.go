package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const (
	redisPort = 6379
	// valueBytes leaves no page without content, which values of a page and
	// more made by DEBUG POPULATE would.
	valueBytes = 1200
	// keyBytes is what redis needs for one in all.
	keyBytes = 1370
)

// Redis starts a redis-server and has it make data until it takes about size
// bytes. It returns how many keys, "key:0" and on, there are.
func (s *Stage) Redis(ctx context.Context, size uint64) (g *Guest, keys int, err error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, 0, fmt.Errorf("redis-server is not installed (make bench installs it): %w", err)
	}
	argv := []string{path, "--port", strconv.Itoa(redisPort), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "",
		"--appendonly", "no", "--dir", "/var/lib/redis", "--logfile", "", "--daemonize", "no"}
	if redisMajor(path) >= 7 { // older ones have no such option, and need none
		argv = append(argv, "--enable-debug-command", "yes")
	}
	g, p, err := s.Start(argv...)
	if err != nil {
		return nil, 0, err
	}
	var c *redisConn
	err = waitFor(ctx, 20*time.Second, p, func() error {
		nc, err := s.lab.Dial(ctx, "tcp", redisAddress(g.Host.Addr().String()))
		if err != nil {
			return err
		}
		c = newRedisConn(nc)
		_, err = c.do("PING")
		return err
	}, func() error { return fmt.Errorf("it ended") })
	if err != nil {
		return nil, 0, fmt.Errorf("redis-server: %w", err)
	}
	defer c.Close()
	keys = max(1, int(size/keyBytes))
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		return nil, 0, err
	}
	if _, err := c.do("DEBUG", "POPULATE", strconv.Itoa(keys), "key", strconv.Itoa(valueBytes)); err != nil {
		return nil, 0, fmt.Errorf("loading redis-server: %w", err)
	}
	return g, keys, nil
}

func redisAddress(host string) string { return net.JoinHostPort(host, strconv.Itoa(redisPort)) }

// redisMajor is the major version of a redis-server, 0 if it cannot be told.
func redisMajor(path string) int {
	out, _ := exec.Command(path, "--version").Output()
	_, v, _ := strings.Cut(string(out), " v=")
	v, _, _ = strings.Cut(v, ".")
	n, _ := strconv.Atoi(v)
	return n
}

// redisConn speaks as much of the Redis protocol as is needed here.
type redisConn struct {
	net.Conn
	r    *bufio.Reader
	out  []byte
	body []byte
}

func newRedisConn(c net.Conn) *redisConn { return &redisConn{Conn: c, r: bufio.NewReader(c)} }

// serverError is an answer that is an error.
type serverError string

func (e serverError) Error() string { return "redis: " + string(e) }

// do sends a command and returns its answer; the answer's bytes are valid until
// the next call. A key that is not there is a serverError.
func (c *redisConn) do(args ...string) ([]byte, error) {
	c.out = fmt.Appendf(c.out[:0], "*%d\r\n", len(args))
	for _, a := range args {
		c.out = fmt.Appendf(c.out, "$%d\r\n%s\r\n", len(a), a)
	}
	if _, err := c.Write(c.out); err != nil {
		return nil, err
	}
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return nil, fmt.Errorf("redis: answer %q is not understood", line)
	}
	kind, text := line[0], line[1:len(line)-2]
	switch kind {
	case '+', ':':
		return text, nil
	case '-':
		return nil, serverError(text)
	case '$':
		n, err := strconv.Atoi(string(text))
		if err != nil || n > 1<<20 {
			return nil, fmt.Errorf("redis: answer of length %q", text)
		}
		if n < 0 {
			return nil, serverError("no such key")
		}
		if cap(c.body) < n+2 {
			c.body = make([]byte, n+2)
		}
		c.body = c.body[:n+2]
		_, err = io.ReadFull(c.r, c.body)
		return c.body[:n], err
	}
	return nil, fmt.Errorf("redis: answer of kind %q is not understood", kind)
}
