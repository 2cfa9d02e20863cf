package rdma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// mid is the median.
func mid(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// perftestLimit is how long one run may take.
const perftestLimit = time.Minute

// perftest runs a program of perftest at both ends of the cable, as its manual
// page says, and returns the average in MiB/s of one for bandwidth, or the typical
// time in microseconds, which is the median, of one for latency.
func perftest(tool string, size, pairs int) func(b *testing.B, amount int) float64 {
	return func(b *testing.B, amount int) float64 {
		b.Helper()
		ctx, cancel := context.WithTimeout(b.Context(), perftestLimit)
		defer cancel()
		start := func(peer string, more ...string) (*exec.Cmd, *bytes.Buffer) {
			p, err := Find(netip.MustParseAddr(peer))
			if err != nil {
				b.Fatal(err)
			}
			args := []string{"-F", "-d", p.Device, "-x", strconv.Itoa(p.GIDIndex), "-s", strconv.Itoa(size), "-n", strconv.Itoa(amount / pairs)}
			if pairs > 1 {
				args = append(args, "-q", strconv.Itoa(pairs))
			}
			cmd := exec.CommandContext(ctx, tool, append(args, more...)...)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			return cmd, &out
		}
		server, said := start(farAddr)
		listening(b)
		client, out := start(nearAddr, nearAddr)
		err := client.Wait()
		if err != nil {
			_ = server.Process.Kill()
		}
		serr := server.Wait()
		if err != nil || serr != nil {
			b.Fatalf("%s: %v, its server: %v\n%s\n%s", tool, err, serr, out, said)
		}
		v, err := perftestResult(out.String(), size)
		if err != nil {
			b.Fatalf("%s: %v\n%s", tool, err, out)
		}
		return v
	}
}

// listening waits until perftest's server does, as proc_net_tcp has it: it takes only
// one connection, so none can be made to find out.
func listening(b *testing.B) {
	b.Helper()
	testutil.Eventually(b, perftestLimit, func() error {
		list, err := os.ReadFile("/proc/net/tcp")
		if err == nil && !strings.Contains(string(list), ":4853 00000000:0000 0A ") { // port 18515
			err = errors.New("perftest's server does not listen")
		}
		return err
	})
}

// perftestResult is the fourth column of the line of that size: the average
// bandwidth, and the typical time where the third and fourth are the least and the most.
func perftestResult(out string, size int) (float64, error) {
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 5 || f[0] != strconv.Itoa(size) {
			continue
		}
		column := 3
		if strings.Contains(out, "t_typical") {
			column = 4
		}
		return strconv.ParseFloat(f[column], 64)
	}
	return 0, fmt.Errorf("no line for %d bytes", size)
}
