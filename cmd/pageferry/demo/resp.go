package demo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
)

// conn speaks as much of the Redis protocol as the demo needs.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func newConn(c net.Conn) *conn { return &conn{Conn: c, r: bufio.NewReader(c)} }

// errNil is the answer for a key that does not exist.
var errNil = errors.New("no such key")

// serverError is an answer that is an error.
type serverError string

func (e serverError) Error() string { return "redis: " + string(e) }

const maxBulk = 64 << 20

// do sends one command and returns its answer, numbers and states as text.
func (c *conn) do(args ...string) (string, error) {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	if _, err := c.Write(b); err != nil {
		return "", err
	}
	line, err := c.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return "", fmt.Errorf("redis: answer %q is not understood", line)
	}
	kind, text := line[0], line[1:len(line)-2]
	switch kind {
	case '+', ':':
		return text, nil
	case '-':
		return "", serverError(text)
	case '$':
		n, err := strconv.Atoi(text)
		if err != nil || n > maxBulk {
			return "", fmt.Errorf("redis: answer of length %q", text)
		}
		if n < 0 {
			return "", errNil
		}
		body := make([]byte, n+2)
		if _, err := io.ReadFull(c.r, body); err != nil {
			return "", err
		}
		return string(body[:n]), nil
	}
	return "", fmt.Errorf("redis: answer of kind %q is not understood", kind)
}
