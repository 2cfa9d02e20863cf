package main

import (
	"crypto/rand"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// beater sends heartbeats, "beat IDENTITY COUNTER NONCE TEXT"; testutil's
// Recorder tells what they prove.
type beater struct {
	network, addr, id string

	mu      sync.Mutex
	counter uint64
}

func newBeater(to, id string) *beater {
	network, addr, _ := strings.Cut(to, ":")
	if network == "unix" {
		network = "unixgram"
	}
	b := &beater{network: network, addr: addr, id: id}
	theBeater.Store(b)
	return b
}

// send sends one heartbeat over a socket made for it: between two of them there
// is none that would have to be carried.
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
	fmt.Fprintf(c, "beat %s %d %x %s", b.id, b.counter, nonce, text)
}

func (b *beater) run() {
	last, longest := time.Now(), time.Duration(0)
	for nap(time.Duration(*beatMS) * time.Millisecond) {
		now := time.Now()
		longest = max(longest, now.Sub(last))
		last = now
		b.send(fmt.Sprintf("gap %d", longest.Nanoseconds()))
	}
}
