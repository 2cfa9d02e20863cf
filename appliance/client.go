package appliance

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/pageferry/pageferry/appliance/keys"
)

// ErrNoDaemon: nobody answers at the API socket.
var ErrNoDaemon = errors.New("no daemon")

// ErrDaemonGone: the daemon ended while a migration was being followed. What
// became of the migration, the daemon knows when it is back.
var ErrDaemonGone = errors.New("the daemon went away")

// Client talks to a daemon's API. Safe for concurrent use.
type Client struct {
	at     string // for people
	remote bool
	http   *http.Client
}

// NewClient is a client of the daemon whose API is at the path socket.
func NewClient(socket string) *Client {
	return &Client{at: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// NewRemoteClient is a client of the daemon whose API is served at addr, HOST:PORT,
// under mutual TLS. cfg is what keys.LoadTLS gives for clients; the daemon must be
// certified under name.
func NewRemoteClient(addr, name string, cfg *tls.Config) *Client {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: keys.Named(cfg, name)}
	return &Client{at: addr, remote: true, http: &http.Client{Transport: &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) },
		IdleConnTimeout: time.Minute,
	}}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://pageferry/v1"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case err == nil:
		return resp, nil
	case c.remote && errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w at %s: start one there whose configuration has api_listen", ErrNoDaemon, c.at)
	case c.remote:
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: permission denied: this needs root, run it with sudo", c.at)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w at %s: start one with \"pageferry daemon\", or name its socket with --socket", ErrNoDaemon, c.at)
	}
	return nil, fmt.Errorf("daemon at %s: %w", c.at, err)
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	return decodeAnswer(resp, out)
}

// Info says who the daemon is.
func (c *Client) Info(ctx context.Context) (DaemonInfo, error) {
	var i DaemonInfo
	return i, c.call(ctx, http.MethodGet, "/daemon", nil, &i)
}

// Processes are those of the host that can be named to Migrate. Those whose number is in
// one of the files say so.
func (c *Client) Processes(ctx context.Context, pidFiles ...string) ([]ProcessInfo, error) {
	var ps []ProcessInfo
	return ps, c.call(ctx, http.MethodGet, "/processes?"+url.Values{"pidfile": pidFiles}.Encode(), nil, &ps)
}

// Migrate begins a migration, which goes on without the caller.
func (c *Client) Migrate(ctx context.Context, req MigrateRequest) (Report, error) {
	var r Report
	req.DryRun = false
	return r, c.call(ctx, http.MethodPost, "/migrations", req, &r)
}

// DryRun asks source and destination whether a migration could be, and what it
// would cost in each mode.
func (c *Client) DryRun(ctx context.Context, req MigrateRequest) (DryRunReport, error) {
	var r DryRunReport
	req.DryRun = true
	return r, c.call(ctx, http.MethodPost, "/migrations", req, &r)
}

// List is every migration that the daemon knows, oldest first.
func (c *Client) List(ctx context.Context) ([]Report, error) {
	var rs []Report
	return rs, c.call(ctx, http.MethodGet, "/migrations", nil, &rs)
}

// Show is one migration; the beginning of its id is enough.
func (c *Client) Show(ctx context.Context, id string) (Report, error) {
	var r Report
	return r, c.call(ctx, http.MethodGet, "/migrations/"+url.PathEscape(id), nil, &r)
}

// Memory says where the memory of a migration that arrives here can be read.
func (c *Client) Memory(ctx context.Context, id string) (Memory, error) {
	var m Memory
	return m, c.call(ctx, http.MethodGet, "/migrations/"+url.PathEscape(id)+"/memory", nil, &m)
}

// Release lets go of memory that is kept readable, and with it of the source's copy.
func (c *Client) Release(ctx context.Context, id string) (Report, error) {
	var r Report
	return r, c.call(ctx, http.MethodPost, "/migrations/"+url.PathEscape(id)+"/release", nil, &r)
}

// Cancel asks for the end of a migration that has not switched over.
func (c *Client) Cancel(ctx context.Context, id string) (Report, error) {
	var r Report
	return r, c.call(ctx, http.MethodPost, "/migrations/"+url.PathEscape(id)+"/cancel", nil, &r)
}

// Resolve says whose the process of a migration is that the hosts cannot agree on.
func (c *Client) Resolve(ctx context.Context, id string, req ResolveRequest) (Report, error) {
	var r Report
	return r, c.call(ctx, http.MethodPost, "/migrations/"+url.PathEscape(id)+"/resolve", req, &r)
}

// Watch calls on for every change of a migration, the last time with the
// finished report, which it returns.
func (c *Client) Watch(ctx context.Context, id string, on func(Report)) (Report, error) {
	var last Report
	resp, err := c.do(ctx, http.MethodGet, "/migrations/"+url.PathEscape(id)+"/events", nil)
	if err != nil {
		return last, err
	}
	if resp.StatusCode != http.StatusOK {
		return last, decodeAnswer(resp, &last)
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var r Report
		if err := dec.Decode(&r); err != nil {
			if ctx.Err() != nil {
				return last, ctx.Err()
			}
			return last, fmt.Errorf("migration %s: %w after state %q: \"pageferry show %s\" tells more when it is back", id, ErrDaemonGone, last.State, id)
		}
		last = r
		if on != nil {
			on(r)
		}
		if r.Finished() {
			return last, nil
		}
	}
}
