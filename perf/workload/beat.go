package workload

import (
	"crypto/rand"
	"fmt"
	"net"
	"sync"
	"time"
)

// beater sends heartbeats: datagrams "beat IDENTITY COUNTER NONCE TEXT". The
// counter is a word of this process's memory and the nonce is drawn anew each
// time, so that a second owner of the same memory gives itself away.
type beater struct {
	network, addr, id string

	mu      sync.Mutex
	counter uint64
}

func newBeater(cfg *Config) *beater {
	network, addr, _ := splitAddress(cfg.Heartbeat)
	b := &beater{network: network, addr: addr, id: cfg.Identity}
	if b.id == "" {
		b.id = "workload-" + rand.Text()[:8]
	}
	return b
}

// send sends one heartbeat, over a socket made for it: between two of them there
// is none that a migration would have to carry. What cannot be sent is lost, and
// its counter with it.
func (b *beater) send(text string) {
	if b.network == "" {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.counter++
	var nonce [8]byte
	_, _ = rand.Read(nonce[:])
	c, err := net.Dial(b.network, b.addr)
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = fmt.Fprintf(c, "beat %s %d %x %s", b.id, b.counter, nonce, text)
}
