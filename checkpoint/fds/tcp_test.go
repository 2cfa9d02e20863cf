package fds

import (
	"context"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
)

// TestDestroy ends the sockets of a stopped process: a client whose connection
// was never accepted gets a reset at once, and nobody can connect any more.
func TestDestroy(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := startTable(t, "make", t.TempDir())
	const ownPort = 65 // OWNPORT of testdata/table.c
	name, err := sys.Sockname(duplicate(t, p.Pid(), ownPort))
	if err != nil {
		t.Fatal(err)
	}
	addr := addrString(name)
	ls, err := ListenersOf(context.Background(), p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(ls, func(l Listener) bool { return l.FD == ownPort && l.String() == "tcp "+addr && l.Backlog == 5 }) {
		t.Errorf("%s is not among the listeners: %v", addr, ls)
	}
	client, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	stop(t, p)
	found, err := FindTCP(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	// The duplicate that this test holds makes no difference: we are ourselves.
	if _, err := found.Destroy(); err != nil {
		t.Fatal(err)
	}
	_ = client.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client reads %v", err)
	}
	if c, err := net.DialTimeout("tcp", addr, 5*time.Second); err == nil {
		c.Close()
		t.Error("the listener still takes connections")
	}
	if again, err := found.Destroy(); err != nil || again.Listeners+again.Connections != 0 {
		t.Errorf("a second time it ended %+v: %v", again, err)
	}
}
