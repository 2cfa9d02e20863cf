package testutil

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// RedisClient speaks just enough of redis's protocol for tests. It is not safe
// for concurrent use.
type RedisClient struct {
	c     net.Conn
	r     *bufio.Reader
	limit time.Duration
}

// DialRedis connects; limit is for the connection and then for each command.
func DialRedis(network, addr string, limit time.Duration) (*RedisClient, error) {
	c, err := net.DialTimeout(network, addr, limit)
	if err != nil {
		return nil, err
	}
	return NewRedisClient(c, limit), nil
}

// NewRedisClient speaks over c, which it owns.
func NewRedisClient(c net.Conn, limit time.Duration) *RedisClient {
	return &RedisClient{c, bufio.NewReader(c), limit}
}

// Close closes the connection.
func (c *RedisClient) Close() error { return c.c.Close() }

// RedisError is an answer that begins with '-'.
type RedisError string

func (e RedisError) Error() string { return "redis: " + string(e) }

// Do sends one command and returns its answer: a string, an int64, a []any of
// these, or nil.
func (c *RedisClient) Do(args ...string) (any, error) {
	if err := c.c.SetDeadline(time.Now().Add(c.limit)); err != nil {
		return nil, err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	if _, err := io.WriteString(c.c, b.String()); err != nil {
		return nil, err
	}
	return c.answer()
}

func (c *RedisClient) answer() (any, error) {
	line, err := c.r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return nil, errors.New("redis: empty answer")
	}
	body := line[1:]
	switch line[0] {
	case '+':
		return body, nil
	case '-':
		return nil, RedisError(body)
	case ':':
		return strconv.ParseInt(body, 10, 64)
	case '$':
		n, err := strconv.Atoi(body)
		if err != nil || n < 0 {
			return nil, err
		}
		buf := make([]byte, n+2)
		if _, err := io.ReadFull(c.r, buf); err != nil {
			return nil, err
		}
		return string(buf[:n]), nil
	case '*':
		n, err := strconv.Atoi(body)
		if err != nil || n < 0 {
			return nil, err
		}
		list := make([]any, n)
		for i := range list {
			if list[i], err = c.answer(); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	return nil, fmt.Errorf("redis: strange answer %q", line)
}
