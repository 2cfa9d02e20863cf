package bench

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/pageferry/pageferry/appliance/lab"
)

// Shape makes the link between the hosts as slow as rate, in bits per second, each
// way: tbf(8) on both of its ends. It counts what a network card would send, but
// for preamble and gap between packets.
func (s *Stage) Shape(ctx context.Context, rate uint64) error {
	a, b := s.Hosts()
	for _, end := range []struct {
		from *lab.Host
		to   string
	}{{a, b.Name()}, {b, a.Name()}} {
		// tbf(8): the burst is what may go at once after a wait. A millisecond's worth
		// makes up for late timers, and holds a packet of 64 KiB, which is
		// what comes from TCP. The queue is that of a switch with shallow buffers.
		burst := max(rate/8/1000, 128<<10)
		_, err := end.from.Run(ctx, "tc", "qdisc", "replace", "dev", "to-"+end.to, "root", "tbf",
			"rate", strconv.FormatUint(rate, 10)+"bit", "burst", strconv.FormatUint(burst, 10), "latency", "20ms")
		if err != nil {
			return fmt.Errorf("shape the link: %w", err)
		}
	}
	return nil
}

// Crossed is how many bytes a shaped link has carried, both ways, headers of packets
// included.
func (s *Stage) Crossed(ctx context.Context) (sum uint64, err error) {
	a, b := s.Hosts()
	for _, end := range []struct {
		from *lab.Host
		to   string
	}{{a, b.Name()}, {b, a.Name()}} {
		text, err := end.from.Run(ctx, "tc", "-s", "qdisc", "show", "dev", "to-"+end.to)
		if err != nil {
			return 0, fmt.Errorf("statistics of the link: %w", err)
		}
		_, rest, _ := strings.Cut(text, "Sent ") // "Sent N bytes M pkt"
		number, _, _ := strings.Cut(rest, " ")
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("statistics of the link: %q is not understood", text)
		}
		sum += n
	}
	return sum, nil
}
