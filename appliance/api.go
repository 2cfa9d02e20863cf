package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/migrate"
)

// The API is HTTP with JSON bodies over a unix socket of mode 0600. Besides the
// mode, the peer's credentials are checked (SO_PEERCRED): root, or the user that
// the daemon runs as. With api_listen it is served over mutual TLS as well, to operators.
//
//	GET  /v1/daemon                    DaemonInfo
//	GET  /v1/processes                 []ProcessInfo; pidfile=PATH, repeated, marks whose number is there
//	POST /v1/migrations                MigrateRequest -> Report (202) or DryRunReport (200)
//	GET  /v1/migrations                []Report, oldest first
//	GET  /v1/migrations/{id}           Report; the beginning of an id is enough
//	GET  /v1/migrations/{id}/events    Report as one JSON line per change, until it is finished
//	POST /v1/migrations/{id}/cancel    Report
//	POST /v1/migrations/{id}/resolve   ResolveRequest -> Report
//	GET  /v1/migrations/{id}/memory    Memory
//	POST /v1/migrations/{id}/release   Report
//
// An error is an APIError with a status other than 2xx.

// MigrateRequest asks a daemon to send a process away. Fields left empty take
// the daemon's defaults.
type MigrateRequest struct {
	// ID, 32 hexadecimal digits, is the migration's, chosen by whoever may have to ask
	// again: the same request is carried out once. Empty: the daemon chooses.
	ID  string `json:"id,omitempty"`
	PID int    `json:"pid"`
	// Started, if set, is ProcessInfo.Started: another process that has the number by now
	// is refused.
	Started      uint64            `json:"started,omitempty"`
	To           string            `json:"to"` // host[:port]
	Mode         string            `json:"mode,omitempty"`
	Trap         string            `json:"trap,omitempty"`
	Transport    string            `json:"transport,omitempty"`
	TCP          string            `json:"tcp,omitempty"`
	Addresses    map[string]string `json:"addresses,omitempty"`
	PIDNS        string            `json:"pidns,omitempty"`
	OnSourceExit string            `json:"on_source_exit,omitempty"`
	// MaxDowntimeMS is how long the program may stand still at the switch, in
	// milliseconds, and Throttle how much of its time it may be kept from running
	// so that pre-copy converges, below 1. Only with rounds.
	MaxDowntimeMS float64 `json:"max_downtime_ms,omitempty"`
	Throttle      float64 `json:"throttle,omitempty"`
	// AddressOrder sends rounds by address instead of by last write: benchmarks
	// compare the two. The command line has no option for it.
	AddressOrder bool `json:"address_order,omitempty"`
	// MaxBandwidth limits the page lanes, as in "10Gbit" or "500MiB" per second;
	// "none" takes back the daemon's default.
	MaxBandwidth string `json:"max_bandwidth,omitempty"`
	// Compress is auto (what gets across sooner), lz4 or none.
	Compress string `json:"compress,omitempty"`
	// Shown is drop or keep: whether the memory can be read at the destination for
	// as long as pages are missing, or until it is released there (ShownKeep).
	Shown string `json:"shown,omitempty"`
	// Lanes is how many connections carry background pages, 1 to 16.
	Lanes  int  `json:"lanes,omitempty"`
	DryRun bool `json:"dry_run,omitempty"`
}

// DryRunReport says what would happen.
type DryRunReport struct {
	Inspection  Inspection `json:"inspection"`
	Destination string     `json:"destination"` // its name, or its address
	// Reasons why the destination would refuse; none: it would take it.
	Reasons []string `json:"reasons"`
	// Outlook is nil where it cannot or would not be taken.
	*Outlook
}

// DaemonInfo says who answers.
type DaemonInfo struct {
	Name   string `json:"name"`
	PID    int    `json:"pid"`
	Listen string `json:"listen"`
}

// Kinds of an APIError, from which a command's exit status follows.
const (
	KindUsage   = "usage"
	KindRefused = "refused"
	KindUnknown = "unknown"
	KindFailed  = "failed"
)

// APIError is why a request was not done.
type APIError struct {
	Kind    string   `json:"kind"`
	Message string   `json:"error"`
	Reasons []string `json:"reasons,omitempty"`
}

func (e *APIError) Error() string { return e.Message }

// UsageError is a request that makes no sense whatever the state of things.
type UsageError struct{ Msg string }

func (e *UsageError) Error() string { return e.Msg }

// watchInterval bounds how often a watcher hears of a change.
const watchInterval = 100 * time.Millisecond

type api struct {
	d   *Daemon
	log *slog.Logger
}

// listenAPI makes the socket. A socket file that nobody listens on is removed;
// one with a daemon behind it is an error.
func listenAPI(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("api socket: %w", err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("api socket %s: another daemon listens there", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("api socket: %w", err)
	}
	// The mode is set by umask at bind: between bind and chmod anyone could
	// connect. The umask is the process's, and only start-up runs here.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("api socket: %w", err)
	}
	return l, nil
}

func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/daemon", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.d.Info())
	})
	mux.HandleFunc("GET /v1/processes", func(w http.ResponseWriter, r *http.Request) {
		ps, err := a.d.Processes(r.URL.Query()["pidfile"])
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, ps)
	})
	mux.HandleFunc("POST /v1/migrations", a.migrate)
	mux.HandleFunc("GET /v1/migrations", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, a.d.registry.list())
	})
	mux.HandleFunc("GET /v1/migrations/{id}", func(w http.ResponseWriter, r *http.Request) {
		_, rep, err := a.d.registry.find(r.PathValue("id"))
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, rep)
	})
	mux.HandleFunc("GET /v1/migrations/{id}/events", a.events)
	mux.HandleFunc("POST /v1/migrations/{id}/cancel", a.cancel)
	mux.HandleFunc("POST /v1/migrations/{id}/resolve", a.resolve)
	mux.HandleFunc("GET /v1/migrations/{id}/memory", func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, a.d.Memory)
	})
	mux.HandleFunc("POST /v1/migrations/{id}/release", func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, a.d.Release)
	})
	return mux
}

// request reads the body of a request, strictly.
func request[T any](w http.ResponseWriter, r *http.Request) (req T, err error) {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		return req, &UsageError{Msg: "the request is not understood: " + err.Error()}
	}
	return req, nil
}

func (a *api) migrate(w http.ResponseWriter, r *http.Request) {
	req, err := request[MigrateRequest](w, r)
	if err != nil {
		fail(w, err)
		return
	}
	if req.DryRun {
		rep, err := a.d.DryRun(r.Context(), req)
		if err != nil {
			fail(w, err)
			return
		}
		reply(w, http.StatusOK, rep)
		return
	}
	rep, err := a.d.Migrate(req)
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusAccepted, rep)
}

func (a *api) cancel(w http.ResponseWriter, r *http.Request) {
	m, rep, err := a.d.registry.find(r.PathValue("id"))
	switch {
	case err != nil:
		fail(w, err)
	case m == nil:
		fail(w, fmt.Errorf("migration %s is over: %s", rep.ID, rep.Outcome))
	default:
		if err := m.stop(); err != nil {
			fail(w, err)
			return
		}
		rep, _ = m.snapshot()
		reply(w, http.StatusAccepted, rep)
	}
}

func (a *api) resolve(w http.ResponseWriter, r *http.Request) {
	req, err := request[ResolveRequest](w, r)
	if err != nil {
		fail(w, err)
		return
	}
	rep, err := a.d.Resolve(r.Context(), r.PathValue("id"), req)
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusOK, rep)
}

// events streams a report per change, at most one per watchInterval, the last
// one being the finished report.
func (a *api) events(w http.ResponseWriter, r *http.Request) {
	m, rep, err := a.d.registry.find(r.PathValue("id"))
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc, enc := http.NewResponseController(w), json.NewEncoder(w)
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		var changed <-chan struct{}
		if m != nil {
			rep, changed = m.snapshot()
		}
		if enc.Encode(rep) != nil || rc.Flush() != nil {
			return // the watcher has gone
		}
		if m == nil || rep.Finished() {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-a.d.stopping:
			return
		}
		if now, _ := m.snapshot(); now.Finished() {
			continue
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-a.d.stopping:
			return
		}
	}
}

// answer replies with what f says of the migration that r names.
func answer[T any](w http.ResponseWriter, r *http.Request, f func(ctx context.Context, id string) (T, error)) {
	body, err := f(r.Context(), r.PathValue("id"))
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, http.StatusOK, body)
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a client that has gone misses its answer
}

func fail(w http.ResponseWriter, err error) {
	e := APIError{Kind: KindFailed, Message: err.Error()}
	status := http.StatusInternalServerError
	var usage *UsageError
	var refusal *migrate.Refusal
	switch {
	case errors.As(err, &usage), errors.Is(err, ErrAmbiguous):
		e.Kind, status = KindUsage, http.StatusBadRequest
	case errors.As(err, &refusal):
		e.Kind, e.Reasons, status = KindRefused, refusal.Reasons, http.StatusConflict
	case errors.Is(err, ErrBusy), errors.Is(err, ErrNotShown), errors.Is(err, migrate.ErrCommitted):
		e.Kind, e.Reasons, status = KindRefused, []string{err.Error()}, http.StatusConflict
	case errors.Is(err, ErrUnknown):
		e.Kind, status = KindUnknown, http.StatusNotFound
	}
	reply(w, status, e)
}

type credentialsKey struct{}

// connContext remembers who is at the other end of an API connection.
func connContext(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if err := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || cred == nil {
		return ctx
	}
	return context.WithValue(ctx, credentialsKey{}, cred)
}

func authorised(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cred, ok := r.Context().Value(credentialsKey{}).(*unix.Ucred)
		if !ok || (cred.Uid != 0 && int(cred.Uid) != os.Geteuid()) {
			reply(w, http.StatusForbidden, APIError{Kind: KindUsage,
				Message: "only root and the daemon's own user may ask; run the command with sudo"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// serve serves those whom allow lets through until ctx ends.
func (a *api) serve(ctx context.Context, l net.Listener, allow func(http.Handler) http.Handler) error {
	srv := &http.Server{
		Handler:           allow(a.handler()),
		ConnContext:       connContext,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	defer stop()
	err := srv.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("api: %w", err)
}

// decodeAnswer reads a response of the API into out.
func decodeAnswer(resp *http.Response, out any) error {
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		var e APIError
		if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&e); err != nil || e.Message == "" {
			return fmt.Errorf("the daemon answered %s", resp.Status)
		}
		return &e
	}
	return json.NewDecoder(resp.Body).Decode(out)
}
