package rdma

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// impair makes network devices lose some of the packets that leave them, and
// delay the others.
func impair(t testing.TB, lossPercent float32, delay time.Duration, netdevs ...string) {
	t.Helper()
	for _, name := range netdevs {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		q := netlink.NewNetem(netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			netlink.NetemQdiscAttrs{Loss: lossPercent, Latency: uint32(delay.Microseconds()), Limit: 100000})
		if err := netlink.QdiscAdd(q); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := netlink.QdiscDel(q); err != nil {
				t.Error(err)
			}
		})
	}
}

// testLossy: what is sent over a lane arrives as it was and in order, in both
// directions at once, while the network loses packets.
func testLossy(t *testing.T) {
	testutil.Require(t, twoDevices)
	const size = 64 << 10
	const each = 10 << 20 / size * 4 / 3
	payload := func(i int) int { // every fourth goes in the stream
		if i%4 == 0 {
			return inlinePayload
		}
		return size
	}
	x, y, _ := pair(t, bulkID)
	path := x.dev.Path()
	before, err := Counters(path.Device, path.Port)
	if err != nil {
		t.Fatal(err)
	}
	impair(t, 1, time.Millisecond, path.Netdev, y.dev.Path().Netdev)
	content := make([]byte, size)
	g := rand.NewChaCha8([32]byte{3})
	_, _ = g.Read(content)
	errs := make(chan error, 4)
	for _, l := range []*Lane{x, y} {
		go func() {
			errs <- func() error {
				for i := range each {
					b := l.cfg.Pool.Get(payload(i), l.done)
					if b == nil {
						return errors.New("the lane has ended")
					}
					copy(b.Bytes(), content[:payload(i)])
					binary.LittleEndian.PutUint64(b.Bytes(), uint64(i))
					if err := l.Send(transport.Frame{Type: wire.TypePages, Payload: b}); err != nil {
						return err
					}
				}
				return nil
			}()
		}()
		go func() {
			errs <- func() error {
				for i := range each {
					f, err := l.Recv()
					if err != nil {
						return err
					}
					b := f.Payload.Bytes()
					if len(b) != payload(i) || binary.LittleEndian.Uint64(b) != uint64(i) || !bytes.Equal(b[8:], content[8:len(b)]) {
						err = fmt.Errorf("frame %d is not what was sent", i)
					}
					f.Payload.Release()
					if err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	after, err := Counters(path.Device, path.Port)
	if err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(after, func(name string, v uint64) bool { return v == before[name] })
	t.Log(after)
	if after["completer_retry_err"] == before["completer_retry_err"] && after["out_of_seq_request"] == before["out_of_seq_request"] && !t.Failed() {
		t.Errorf("nothing was lost: %v", after)
	}
}
