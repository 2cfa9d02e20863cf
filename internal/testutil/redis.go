package testutil

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// RedisServer is a real redis-server, without persistence, that listens on a
// unix socket and, if asked, on TCP.
type RedisServer struct {
	*Process
	// Network and Addr are where clients reach it. Change them when it moved.
	Network, Addr string
	// Dir is its working directory.
	Dir string
}

// RedisConfig says how to start it. The zero value listens on a unix socket.
type RedisConfig struct {
	// TCP listens on a free port of 127.0.0.1 instead.
	TCP bool
	// Args are appended to the command line.
	Args []string
	// Limit is how long it may run. Default: DefaultLimit.
	Limit time.Duration
}

// Redis starts a redis-server on a unix socket and waits until it answers.
func Redis(t testing.TB) *RedisServer { return RedisWith(t, RedisConfig{}) }

// RedisWith is Redis with a configuration.
func RedisWith(t testing.TB, cfg RedisConfig) *RedisServer {
	t.Helper()
	Require(t, Program("redis-server"))
	path, _ := lookPath("redis-server")
	r := &RedisServer{Network: "unix", Addr: Socket(t, "redis"), Dir: t.TempDir()}
	port := "0"
	if cfg.TCP {
		r.Network, r.Addr = "tcp", FreePort(t)
		_, port, _ = net.SplitHostPort(r.Addr)
	}
	args := []string{"--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
		"--dir", r.Dir, "--daemonize", "no", "--protected-mode", "no"}
	if !cfg.TCP {
		args = append(args, "--unixsocket", r.Addr)
	}
	if redisMajor(path) >= 7 {
		args = append(args, "--enable-debug-command", "yes")
	}
	cmd := exec.Command(path, append(args, cfg.Args...)...)
	cmd.Dir = r.Dir
	if cfg.Limit == 0 {
		cfg.Limit = DefaultLimit
	}
	r.Process = StartCmd(t, cmd, cfg.Limit)
	Eventually(t, 20*time.Second, func() error {
		if !r.Alive() {
			t.Fatalf("redis-server ended:\n%s", r.Text())
		}
		return r.ping()
	})
	return r
}

// redisMajor is the major version of a redis-server, 0 if it cannot be told.
func redisMajor(path string) int {
	out, _ := exec.Command(path, "--version").Output()
	_, v, _ := strings.Cut(string(out), "v=")
	v, _, _ = strings.Cut(v, ".")
	n, _ := strconv.Atoi(v)
	return n
}

// FreePort returns "127.0.0.1:port" with a TCP port that was free just now.
func FreePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Dial returns a client. It is closed at the end of the test.
func (r *RedisServer) Dial() *RedisClient {
	r.t.Helper()
	c, err := DialRedis(r.Network, r.Addr, 30*time.Second)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// Do sends one command over a connection of its own.
func (r *RedisServer) Do(args ...string) any {
	r.t.Helper()
	c, err := DialRedis(r.Network, r.Addr, time.Minute)
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	v, err := c.Do(args...)
	if err != nil {
		r.t.Fatalf("redis %s: %v", strings.Join(args, " "), err)
	}
	return v
}

// Populate makes n keys "key:i" with values of about that many bytes.
func (r *RedisServer) Populate(n, bytes int) {
	r.t.Helper()
	r.Do("DEBUG", "POPULATE", strconv.Itoa(n), "key", strconv.Itoa(bytes))
}

// Digest is a checksum over all its data.
func (r *RedisServer) Digest() string {
	r.t.Helper()
	return fmt.Sprint(r.Do("DEBUG", "DIGEST"))
}

// Ping fails the test unless the server answers.
func (r *RedisServer) Ping() {
	r.t.Helper()
	if err := r.ping(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *RedisServer) ping() error {
	c, err := DialRedis(r.Network, r.Addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	v, err := c.Do("PING")
	if err != nil {
		return err
	}
	if v != "PONG" {
		return fmt.Errorf("redis: PING was answered %v", v)
	}
	return nil
}

// MemcachedServer is a real memcached on a unix socket or on TCP.
type MemcachedServer struct {
	*Process
	Network, Addr string
}

// Memcached starts a memcached with four threads on a unix socket and waits
// until it answers. Further arguments go to its command line.
func Memcached(t testing.TB, args ...string) *MemcachedServer {
	t.Helper()
	m := &MemcachedServer{Network: "unix", Addr: Socket(t, "memcached")}
	m.start(t, append([]string{"-s", m.Addr}, args...))
	return m
}

// MemcachedTCP is Memcached on a free port of 127.0.0.1.
func MemcachedTCP(t testing.TB, args ...string) *MemcachedServer {
	t.Helper()
	m := &MemcachedServer{Network: "tcp", Addr: FreePort(t)}
	host, port, _ := net.SplitHostPort(m.Addr)
	m.start(t, append([]string{"-l", host, "-p", port, "-U", "0"}, args...))
	return m
}

func (m *MemcachedServer) start(t testing.TB, args []string) {
	t.Helper()
	Require(t, Program("memcached"))
	if os.Geteuid() == 0 {
		args = append(args, "-u", "root")
	}
	m.Process = Start(t, "memcached", append([]string{"-t", "4"}, args...)...)
	Eventually(t, 20*time.Second, func() error {
		if !m.Alive() {
			t.Fatalf("memcached ended:\n%s", m.Text())
		}
		_, err := m.do("version\r\n", "\r\n")
		return err
	})
}

// Populate stores n keys "key:i" whose values follow from i, and Verify checks
// them all.
func (m *MemcachedServer) Populate(n, bytes int) {
	m.t.Helper()
	c, err := net.DialTimeout(m.Network, m.Addr, 10*time.Second)
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	var b strings.Builder
	for i := range n {
		v := memcachedValue(i, bytes)
		fmt.Fprintf(&b, "set key:%d 0 0 %d noreply\r\n%s\r\n", i, len(v), v)
	}
	b.WriteString("version\r\n")
	if _, err := c.Write([]byte(b.String())); err != nil {
		m.t.Fatal(err)
	}
	if _, err := readUntil(c, "\r\n"); err != nil {
		m.t.Fatal(err)
	}
}

// Verify fails the test unless all keys that Populate made are right.
func (m *MemcachedServer) Verify(n, bytes int) {
	m.t.Helper()
	for i := range n {
		want := memcachedValue(i, bytes)
		got, err := m.do(fmt.Sprintf("get key:%d\r\n", i), "END\r\n")
		if err != nil {
			m.t.Fatalf("memcached key:%d: %v", i, err)
		}
		if exp := fmt.Sprintf("VALUE key:%d 0 %d\r\n%s\r\nEND\r\n", i, len(want), want); got != exp {
			m.t.Fatalf("memcached key:%d is wrong: %.80q", i, got)
		}
	}
}

func memcachedValue(i, bytes int) string {
	s := strconv.Itoa(i) + "."
	return strings.Repeat(s, bytes/len(s)+1)[:bytes]
}

func (m *MemcachedServer) do(cmd, end string) (string, error) {
	c, err := net.DialTimeout(m.Network, m.Addr, 10*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Write([]byte(cmd)); err != nil {
		return "", err
	}
	return readUntil(c, end)
}

func readUntil(c net.Conn, end string) (string, error) {
	var b []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		b = append(b, buf[:n]...)
		if strings.HasSuffix(string(b), end) {
			return string(b), nil
		}
		if err != nil {
			return string(b), err
		}
	}
}

// Python starts test/programs/NAME with python3; see [Program].
func Python(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	Require(t, Program("python3"))
	script := filepath.Join(ModuleRoot(t), "test", "programs", name)
	return Start(t, pythonPath(t), append([]string{"-u", script}, args...)...)
}

// pythonPath is the interpreter itself, where python3 is a script that finds it.
func pythonPath(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		t.Fatalf("python3: %v", err)
	}
	return strings.TrimSpace(string(out))
}
