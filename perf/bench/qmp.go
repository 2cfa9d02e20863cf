package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// qmp is a connection to QEMU's monitor. The protocol is in docs/interop/qmp-spec
// of QEMU's sources: JSON objects, an answer to each command, events in between.
type qmp struct {
	conn net.Conn
	in   *bufio.Reader
}

// dialQMP waits for the socket at path.
func dialQMP(ctx context.Context, path string) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn, bufio.NewReader(conn)}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = q.in.ReadBytes('\n') // the greeting
	if err == nil {
		err = q.do("qmp_capabilities", nil, nil)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("qemu: %w", err), conn.Close())
	}
	return q, nil
}

// do executes a command and stores what it returns in out, which may be nil.
func (q *qmp) do(command string, args, out any) error {
	fail := func(err error) error { return fmt.Errorf("qemu: %s: %w", command, err) }
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fail(err)
	}
	_ = q.conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := q.conn.Write(append(b, '\n')); err != nil {
		return fail(err)
	}
	for {
		line, err := q.in.ReadBytes('\n')
		if err != nil {
			return fail(err)
		}
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			return fail(err)
		}
		switch {
		case answer.Error != nil:
			return fail(errors.New(answer.Error.Desc))
		case answer.Return == nil: // an event
		case out == nil:
			return nil
		default:
			return json.Unmarshal(answer.Return, out)
		}
	}
}

func (q *qmp) close() error { return q.conn.Close() }
