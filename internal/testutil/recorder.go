package testutil

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Recorder is the outside oracle for two owners: neither host controls it.
//
// A program sends it heartbeats, datagrams of one line each:
//
//	beat IDENTITY COUNTER NONCE [TEXT...]
//
// IDENTITY belongs to the program and moves with its memory. COUNTER, decimal,
// is a word of its memory that grows by one with every heartbeat that it tries
// to send. NONCE, hexadecimal, is drawn anew from the kernel or the processor
// for every heartbeat. Two processes that both believe to be the program hold
// the same counter but cannot draw the same nonces, so the second owner sends
// a counter that was there before (with another nonce), or one below the last.
// A datagram that arrives twice has the same nonce twice and is only counted.
//
// TEXT "bad ..." reports that a self check failed, "ok" that all was verified
// at the end; "gap N" is the longest gap the program saw so far, in
// nanoseconds of its own monotonic clock.
//
// Where the sender can be told (the process on unix sockets, the address on
// UDP) each change of it begins a new epoch, and a sender that comes back after
// another one took over, without a test having allowed that, is a fork too.
type Recorder struct {
	// Address is what programs are given: "unix:PATH" or "udp:HOST:PORT".
	Address string

	t    testing.TB
	conn net.PacketConn
	done chan struct{}

	mu       sync.Mutex
	programs map[string]*Beats
	strange  int
}

// Beats is what is known of one program.
type Beats struct {
	Identity   string
	Count      uint64 // heartbeats that arrived
	Last       uint64 // highest counter
	Duplicates uint64 // datagrams that arrived twice
	// Forks says, for each heartbeat that only a second owner can have sent,
	// what was wrong with it.
	Forks []string
	// Bad has the self checks that failed.
	Bad []string
	// OK is set once the program has said that everything was verified.
	OK bool
	// Gap is the longest gap that the program itself saw; Silence the longest
	// time between two heartbeats as seen here.
	Gap, Silence time.Duration
	// Epochs are the times of one sender each.
	Epochs []Epoch

	nonces map[uint64]string // by counter, the most recent ones
	at     time.Time
}

// Epoch is a time in which heartbeats came from one sender.
type Epoch struct {
	// Sender is "pid N" as seen from here on unix sockets, the address on UDP.
	Sender      string
	First, Last uint64
	Count       uint64
	Began       time.Time
}

// NewRecorder starts a recorder on a unix datagram socket. It also works from
// other network namespaces, where the path can be reached. It is closed at the
// end of the test.
func NewRecorder(t testing.TB) *Recorder {
	t.Helper()
	path := Socket(t, "beats")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	// Programs may run as somebody else, and the kernel says who sent.
	if err := errors.Join(os.Chmod(path, 0o666), os.Chmod(path[:strings.LastIndexByte(path, '/')], 0o755), passCred(c)); err != nil {
		t.Fatal(err)
	}
	return newRecorder(t, c, "unix:"+path)
}

// NewUDPRecorder starts a recorder on addr, such as "127.0.0.1:0".
func NewUDPRecorder(t testing.TB, addr string) *Recorder {
	t.Helper()
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return newRecorder(t, c, "udp:"+c.LocalAddr().String())
}

func newRecorder(t testing.TB, c net.PacketConn, addr string) *Recorder {
	if s, ok := c.(interface{ SetReadBuffer(int) error }); ok {
		_ = s.SetReadBuffer(4 << 20)
	}
	r := &Recorder{Address: addr, t: t, conn: c, done: make(chan struct{}), programs: map[string]*Beats{}}
	go r.run()
	t.Cleanup(r.Close)
	return r
}

func passCred(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	err = raw.Control(func(fd uintptr) {
		e = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	})
	return errors.Join(err, e)
}

// Close stops recording. What was recorded can still be read.
func (r *Recorder) Close() {
	_ = r.conn.Close()
	<-r.done
}

func (r *Recorder) run() {
	defer close(r.done)
	buf, oob := make([]byte, 2048), make([]byte, 256)
	for {
		var n int
		var sender string
		var err error
		if u, ok := r.conn.(*net.UnixConn); ok {
			var k int
			n, k, _, _, err = u.ReadMsgUnix(buf, oob)
			sender = credSender(oob[:k])
		} else {
			var from net.Addr
			n, from, err = r.conn.ReadFrom(buf)
			if a, ok := from.(*net.UDPAddr); ok {
				sender = a.IP.String() // a moved program may get another port
			}
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of somebody who is gone
		}
		r.take(string(buf[:n]), sender, time.Now())
	}
}

func credSender(oob []byte) string {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return ""
	}
	for i := range msgs {
		if c, err := unix.ParseUnixCredentials(&msgs[i]); err == nil && c.Pid > 0 {
			return fmt.Sprintf("pid %d", c.Pid)
		}
	}
	return ""
}

// take records one datagram.
func (r *Recorder) take(line, sender string, now time.Time) {
	f := strings.SplitN(strings.TrimSpace(line), " ", 5)
	var counter, nonce uint64
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(f) < 4 || f[0] != "beat" {
		r.strange++
		return
	}
	if _, err := fmt.Sscanf(f[2]+" "+f[3], "%d %x", &counter, &nonce); err != nil {
		r.strange++
		return
	}
	b := r.programs[f[1]]
	if b == nil {
		b = &Beats{Identity: f[1], nonces: map[uint64]string{}, at: now}
		r.programs[f[1]] = b
	}
	b.take(counter, f[3], sender, now)
	if len(f) == 5 {
		b.text(f[4])
	}
}

// remembered is how many counters' nonces are kept per program.
const remembered = 1 << 16

func (b *Beats) take(counter uint64, nonce, sender string, now time.Time) {
	old, known := b.nonces[counter]
	fork := ""
	switch {
	case known && old == nonce:
		b.Duplicates++
		return
	case known:
		fork = fmt.Sprintf("counter %d came twice, with nonce %s and from %s with nonce %s", counter, old, sender, nonce)
	case b.Count > 0 && counter <= b.Last:
		fork = fmt.Sprintf("counter went back from %d to %d, from %s", b.Last, counter, sender)
	}
	if fork != "" && len(b.Forks) < 100 {
		b.Forks = append(b.Forks, fork)
	}
	b.nonces[counter] = nonce
	if counter >= remembered {
		delete(b.nonces, counter-remembered)
	}
	b.Count++
	b.Last = max(b.Last, counter)
	b.Silence = max(b.Silence, now.Sub(b.at))
	b.at = now
	n := len(b.Epochs)
	if n == 0 || b.Epochs[n-1].Sender != sender {
		b.Epochs = append(b.Epochs, Epoch{Sender: sender, First: counter, Began: now})
		n++
	}
	e := &b.Epochs[n-1]
	e.Last = max(e.Last, counter)
	e.Count++
}

func (b *Beats) text(s string) {
	switch {
	case s == "ok":
		b.OK = true
	case strings.HasPrefix(s, "bad "):
		b.Bad = append(b.Bad, s[4:])
	case strings.HasPrefix(s, "gap "):
		var ns int64
		if _, err := fmt.Sscanf(s, "gap %d", &ns); err == nil {
			b.Gap = max(b.Gap, time.Duration(ns))
		}
	}
}

// Beats returns what is known of a program by now; the zero value for one that
// was never heard of.
func (r *Recorder) Beats(identity string) Beats {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.programs[identity]
	if b == nil {
		return Beats{Identity: identity}
	}
	c := *b
	c.nonces = nil
	c.Forks = append([]string(nil), b.Forks...)
	c.Bad = append([]string(nil), b.Bad...)
	c.Epochs = append([]Epoch(nil), b.Epochs...)
	return c
}

// WaitBeats waits until n more heartbeats of a program have arrived.
func (r *Recorder) WaitBeats(identity string, n uint64, limit time.Duration) Beats {
	r.t.Helper()
	first := r.Beats(identity).Count
	var b Beats
	Eventually(r.t, limit, func() error {
		if b = r.Beats(identity); b.Count < first+n {
			return fmt.Errorf("program %s: %d heartbeats arrived, wanted %d more than %d", identity, b.Count, n, first)
		}
		return nil
	})
	return b
}

// OneOwner fails the test if any program had two owners, or if one of its self
// checks failed. moves is how often each may have changed its sender.
func (r *Recorder) OneOwner(moves int) {
	r.t.Helper()
	for _, p := range r.Problems(moves) {
		r.t.Error(p)
	}
}

// Problems says what OneOwner would fail for.
func (r *Recorder) Problems(moves int) (list []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.strange > 0 {
		list = append(list, fmt.Sprintf("recorder: %d strange datagrams", r.strange))
	}
	for id, b := range r.programs {
		if n := len(b.Forks); n > 0 {
			list = append(list, fmt.Sprintf("program %s had two owners: %d times; first: %s", id, n, b.Forks[0]))
		}
		for _, s := range b.Bad {
			list = append(list, fmt.Sprintf("program %s: %s", id, s))
		}
		if len(b.Epochs) > moves+1 {
			list = append(list, fmt.Sprintf("program %s: heartbeats from %d senders in turn, allowed %d: %v", id, len(b.Epochs), moves+1, b.Epochs))
		}
	}
	return list
}
