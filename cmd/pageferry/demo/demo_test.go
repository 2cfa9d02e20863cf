package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// forgetful is a server that speaks Redis and can lose or damage what it holds.
type forgetful struct {
	mu   sync.Mutex
	data map[string]string
	hurt func(key, value string) (string, bool) // what GET returns instead
	drop int                                    // connections are cut after so many commands; 0 never
}

func (f *forgetful) start(t *testing.T) dialer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); f.serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", l.Addr().String())
	}
}

func (f *forgetful) serve(c net.Conn) {
	r := bufio.NewReader(c)
	for n := 1; ; n++ {
		args, err := readCommand(r)
		if err != nil {
			return
		}
		f.mu.Lock()
		answer := "-ERR\r\n"
		switch args[0] {
		case "SET":
			f.data[args[1]] = args[2]
			answer = "+OK\r\n"
		case "GET":
			v, ok := f.data[args[1]]
			if f.hurt != nil && ok {
				v, ok = f.hurt(args[1], v)
			}
			answer = "$-1\r\n"
			if ok {
				answer = fmt.Sprintf("$%d\r\n%s\r\n", len(v), v)
			}
		}
		f.mu.Unlock()
		if f.drop > 0 && n%f.drop == 0 {
			return // done, and never answered
		}
		if _, err := io.WriteString(c, answer); err != nil {
			return
		}
	}
}

func readCommand(r *bufio.Reader) ([]string, error) {
	count, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(count[1:]))
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		size, err := r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		k, err := strconv.Atoi(strings.TrimSpace(size[1:]))
		if err != nil {
			return nil, err
		}
		b := make([]byte, k+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		args[i] = string(b[:k])
	}
	return args, nil
}

// runClient runs a client until it has written n times or found something.
func runClient(t *testing.T, f *forgetful, n uint64) (*client, error) {
	t.Helper()
	c := &client{dial: f.start(t), addresses: []string{"one", "two"}}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.run(ctx) }()
	for {
		c.mu.Lock()
		enough := c.stats.writes >= n
		c.mu.Unlock()
		if enough {
			cancel()
		}
		select {
		case err := <-done:
			return c, err
		case <-time.After(time.Millisecond):
		}
	}
}

func TestClientFindsNothingWrongWhereNothingIs(t *testing.T) {
	testutil.NoLeaks(t)
	f := &forgetful{data: map[string]string{}, drop: 37}
	c, err := runClient(t, f, 5000)
	if err != nil {
		t.Fatal(err)
	}
	if c.stats.reconnects < 10 || c.stats.reads == 0 || c.stats.gap == 0 {
		t.Errorf("%+v", c.stats)
	}
	n, err := c.checkAll(t.Context())
	if err != nil || n != keysPerClient {
		t.Errorf("%d keys, %v", n, err)
	}
}

// TestClientFindsWhatIsWrong makes sure that the demo could fail.
func TestClientFindsWhatIsWrong(t *testing.T) {
	for name, hurt := range map[string]func(k, v string) (string, bool){
		"lost":    func(string, string) (string, bool) { return "", false },
		"damaged": func(_, v string) (string, bool) { return v[:len(v)-1] + "?", true },
		"old":     func(k, _ string) (string, bool) { return k + "=0;" + strings.Repeat("0", 100), true },
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			f := &forgetful{data: map[string]string{}}
			writes := 0
			f.hurt = func(k, v string) (string, bool) {
				if writes++; writes < 50 {
					return v, true
				}
				return hurt(k, v)
			}
			_, err := runClient(t, f, 1_000_000)
			var wrong *wrongError
			if !errors.As(err, &wrong) {
				t.Errorf("not found: %v", err)
			}
		})
	}
}

func TestDemoConfig(t *testing.T) {
	good := Config{Size: 1 << 30, Hops: 2, Clients: 4}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{{Size: 1, Hops: 1, Clients: 1}, {Size: 1 << 30, Clients: 1}, {Size: 1 << 30, Hops: 1}} {
		if c.Validate() == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
