package survive_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// hops is how often each program goes there and back.
const hops = 8

// modes are all there are, in an order in which each goes both ways.
var modes = []string{"postcopy", "hybrid", "stop", "precopy", "hybrid", "postcopy", "precopy", "stop"}

// whole are those in which the program runs when all of its memory is there. While
// pages are missing, guard pages that it makes (MADV_GUARD_INSTALL) do not last:
// the kernel tells nobody of them, and UFFDIO_COPY puts a page in their place.
var whole = []string{"precopy", "stop", "stop", "precopy"}

// thereAndBack moves the guest to and fro, in all modes in turn, calling between
// after each hop.
func (g *guest) thereAndBack(t *testing.T, modes []string, between func()) {
	t.Helper()
	home := g.at
	var slowest, sum appliance.Report
	for i := range 2 * hops {
		rep := g.hop(modes[i%len(modes)])
		if rep.DowntimeMS > slowest.DowntimeMS {
			slowest = rep
		}
		sum.DowntimeMS += rep.DowntimeMS
		sum.PagesTotal += rep.PagesTotal
		sum.PagesFaulted += rep.PagesFaulted
		if between != nil {
			between()
		}
	}
	if g.at != home {
		t.Errorf("it is on host %s, not on %s where it began", g.at.name(), home.name())
	}
	t.Logf("%d hops: downtime %.1f ms on average, %.1f ms at most; %d pages, %d of them by faults",
		2*hops, sum.DowntimeMS/(2*hops), slowest.DowntimeMS, sum.PagesTotal, sum.PagesFaulted)
}

// Programs that verify themselves all the time go there and back.
func TestHopsOfProgramsThatCheckThemselves(t *testing.T) {
	begin(t)
	top := t
	r := newRig(t)
	type args = []string
	everything := testutil.CC(t, "everything")
	dir := filepath.Dir(testutil.Socket(t, "x"))
	workload := testutil.GoProgram(t, "./test/programs/workload")
	for name, c := range map[string]struct {
		args     args
		modes    []string
		compress string
	}{
		"everything": {args: args{everything, "--threads", "4", "--mem", "16", "--without", "listen,locks,sysv",
			"--dir", dir}}, // both hosts see one /tmp: sockets and locks there would be taken; semaphores are the host's
		"churn":    {args: args{everything, "--only", "churn", "--threads", "2", "--dir", dir}},
		"go":       {args: args{testutil.GoProgram(t, "./test/programs/gcprog"), "-live", "16"}},
		"python":   {args: args{python(t), "-u", filepath.Join(testutil.ModuleRoot(t), "test/programs/selfcheck.py")}},
		"workload": {args: args{workload, "--size", "32MiB", "--rate", "100MiB/s", "--pattern", "edge"}},
		"busy":     {args: args{workload, "--size", "64MiB", "--rate", "800MiB/s", "--pattern", "zipf"}, compress: "lz4"},
		"shapes":   {args: args{everything, "--only", "shapes", "--without", "guards", "--threads", "3", "--dir", dir}},
		"shared":   {args: args{everything, "--only", "shared", "--threads", "3", "--dir", dir}},
		"guards":   {args: args{everything, "--only", "shapes", "--threads", "3", "--dir", dir}, modes: whole, compress: "lz4"},
	} {
		if c.modes == nil {
			c.modes = modes
		}
		t.Run(name, func(t *testing.T) {
			r = r.whole(top)
			r.watch(t)
			g := r.selfChecking(t, r.a, c.args...)
			g.compress = c.compress
			g.thereAndBack(t, c.modes, func() { g.beat(2) })
			g.oneOwner(2 * hops)
			g.verify()
			r.clean(t)
		})
	}
}

// python is the interpreter itself, where python3 is a script that finds it.
func python(t testing.TB) string {
	t.Helper()
	testutil.Require(t, testutil.Program("python3"))
	out, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

const servicePort = 7777

// dial connects to the guest's port, wherever it is: a client that knows both
// hosts.
func (r *rig) dial(ctx context.Context) (net.Conn, error) {
	var errs []error
	for _, n := range r.nodes() {
		c, err := r.lab.Dial(ctx, "tcp", net.JoinHostPort(n.addr(), strconv.Itoa(servicePort)))
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// redis launches redis, for the clients of any host and with all commands.
func (r *rig) redis(t testing.TB) *guest {
	t.Helper()
	return r.server(t, r.a, "redis-server", "--port", strconv.Itoa(servicePort), "--bind", "0.0.0.0", "--save", "", "--appendonly", "no",
		"--dir", t.TempDir(), "--protected-mode", "no", "--enable-debug-command", "yes")
}

// memcached is the same with memcached.
func (r *rig) memcached(t testing.TB) *guest {
	t.Helper()
	return r.server(t, r.a, "memcached", "-t", "4", "-l", "0.0.0.0", "-p", strconv.Itoa(servicePort), "-U", "0", "-u", "root", "-m", "64")
}

// server launches a server and waits until it takes connections.
func (r *rig) server(t testing.TB, n *node, name string, args ...string) *guest {
	t.Helper()
	testutil.Require(t, testutil.Program(name))
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	g := r.launch(t, n, exec.Command(path, args...))
	g.identity = name
	testutil.Eventually(t, 20*time.Second, func() error {
		c, err := r.dial(t.Context())
		if err == nil {
			err = c.Close()
		}
		return err
	})
	return g
}

// client keeps writing to a server and checks what it reads, through all moves.
// Keys are its own, so that it knows every value: the last that was
// acknowledged, or one whose answer never came.
type client struct {
	name          string
	dial          func(context.Context) (net.Conn, error)
	session       func(net.Conn) session
	writes, reads atomic.Uint64
}

// session is a connection that speaks a server's protocol.
type session interface {
	set(key, value string) error
	get(key string) (string, error)
}

const (
	clientKeys = 500
	clients    = 3
)

// run works until ctx ends, then checks every key.
func (c *client) run(ctx context.Context) error {
	acknowledged := map[string]string{}
	maybe := map[string]map[string]bool{}
	right := func(key, got string) bool {
		return got == acknowledged[key] || maybe[key][got]
	}
	var s session
	var conn net.Conn
	hangUp := func() {
		if conn != nil {
			conn.Close()
		}
		s, conn = nil, nil
	}
	defer hangUp()
	reach := func(ctx context.Context) error {
		for s == nil {
			nc, err := c.dial(ctx)
			if err == nil {
				conn, s = nc, c.session(nc)
				return nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(2 * time.Millisecond):
			}
		}
		return nil
	}
	check := func(ctx context.Context, key string) error {
		for {
			if err := reach(ctx); err != nil {
				return fmt.Errorf("%s: the server cannot be reached: %w", key, err)
			}
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			got, err := s.get(key)
			if err != nil {
				hangUp()
				if ctx.Err() != nil {
					return fmt.Errorf("%s: %w", key, err)
				}
				continue
			}
			if !right(key, got) {
				return fmt.Errorf("%s is %q, %q was acknowledged last", key, got, acknowledged[key])
			}
			c.reads.Add(1)
			return nil
		}
	}
	for i := 0; ctx.Err() == nil; i++ {
		key := c.name + ":" + strconv.Itoa(i%clientKeys)
		value := fmt.Sprintf("%d.%s", i, strings.Repeat("x", i%300))
		if reach(ctx) != nil {
			break
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if err := s.set(key, value); err != nil {
			if maybe[key] == nil {
				maybe[key] = map[string]bool{}
			}
			maybe[key][value] = true
			hangUp()
			continue
		}
		acknowledged[key] = value
		delete(maybe, key)
		c.writes.Add(1)
		if i%3 == 0 {
			if err := check(ctx, c.name+":"+strconv.Itoa((i*7)%clientKeys)); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	for key := range acknowledged {
		if err := check(last, key); err != nil {
			return err
		}
	}
	return nil
}

type redisSession struct{ c *testutil.RedisClient }

func (s redisSession) set(key, value string) error {
	_, err := s.c.Do("SET", key, value)
	return err
}

func (s redisSession) get(key string) (string, error) {
	v, err := s.c.Do("GET", key)
	if v == nil {
		return "", err
	}
	return fmt.Sprint(v), err
}

// memcachedSession speaks memcached's text protocol.
type memcachedSession struct{ c net.Conn }

func (s memcachedSession) do(cmd string, ends ...string) (string, error) {
	if _, err := s.c.Write([]byte(cmd)); err != nil {
		return "", err
	}
	var b []byte
	buf := make([]byte, 4096)
	for {
		n, err := s.c.Read(buf)
		b = append(b, buf[:n]...)
		for _, end := range ends {
			if strings.HasSuffix(string(b), end) {
				return string(b), nil
			}
		}
		if err != nil {
			return "", err
		}
	}
}

func (s memcachedSession) set(key, value string) error {
	out, err := s.do(fmt.Sprintf("set %s 0 0 %d\r\n%s\r\n", key, len(value), value), "\r\n")
	if err == nil && out != "STORED\r\n" {
		err = fmt.Errorf("memcached: %q", out)
	}
	return err
}

func (s memcachedSession) get(key string) (string, error) {
	out, err := s.do("get "+key+"\r\n", "END\r\n")
	if err != nil || out == "END\r\n" {
		return "", err
	}
	_, rest, ok := strings.Cut(out, "\r\n")
	if !ok {
		return "", fmt.Errorf("memcached: %q", out)
	}
	return strings.TrimSuffix(rest, "\r\nEND\r\n"), nil
}

// Servers go there and back while clients write and check every answer.
func TestHopsOfServers(t *testing.T) {
	begin(t)
	r := newRig(t)
	t.Run("redis", func(t *testing.T) {
		r.watch(t)
		g := r.redis(t)
		do := func(args ...string) string {
			c, err := r.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			v, err := testutil.NewRedisClient(c, 20*time.Second).Do(args...)
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprint(v)
		}
		do("SELECT", "1")
		do("DEBUG", "POPULATE", "5000", "bulk", "4000")
		sample := func() (out string) {
			for i := 0; i < 5000; i += 97 {
				out += do("GET", "bulk:"+strconv.Itoa(i))
			}
			return out
		}
		before := sample()
		withClients(t, r, func(c net.Conn) session { return redisSession{testutil.NewRedisClient(c, 10*time.Second)} },
			func() { g.thereAndBack(t, modes, nil) })
		if sample() != before {
			t.Error("what nobody wrote to has changed")
		}
		g.end()
		r.clean(t)
	})
	t.Run("memcached", func(t *testing.T) {
		r.watch(t)
		g := r.memcached(t)
		withClients(t, r, func(c net.Conn) session { return memcachedSession{c} }, func() { g.thereAndBack(t, modes, nil) })
		g.end()
		r.clean(t)
	})
}

// withClients has clients at work while f runs; each must make progress.
func withClients(t *testing.T, r *rig, s func(net.Conn) session, f func()) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	var errs [clients]error
	var writes, reads uint64
	all := make([]*client, clients)
	for i := range all {
		all[i] = &client{name: fmt.Sprintf("client%d", i), dial: r.dial, session: s}
		wg.Go(func() { errs[i] = all[i].run(ctx) })
	}
	f()
	stop()
	wg.Wait()
	for i, c := range all {
		if errs[i] != nil {
			t.Error(errs[i])
		}
		if c.writes.Load() < 20*hops || c.reads.Load() < 5*hops {
			t.Errorf("only %d writes acknowledged and %d reads right in %d hops", c.writes.Load(), c.reads.Load(), 2*hops)
		}
		writes, reads = writes+c.writes.Load(), reads+c.reads.Load()
	}
	t.Logf("%d writes acknowledged, %d reads right", writes, reads)
}
