package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"
)

const iperfBinary = "iperf3"

// Iperf measures what one TCP stream carries from one host to the other, in
// GiB/s, by iperf3 as it comes.
func (s *Stage) Iperf(ctx context.Context, d time.Duration) (float64, error) {
	from, to := s.Hosts()
	cmd := exec.Command(iperfBinary, "-s", "-1")
	cmd.Stderr = os.Stderr
	p, err := to.Start("iperf3", cmd)
	if err != nil {
		return 0, err
	}
	s.ends = append(s.ends, p)
	var out string
	err = waitFor(ctx, 30*time.Second, p, func() (err error) { // until it listens
		out, err = from.Run(ctx, iperfBinary, "-c", to.Addr().String(), "-J", "-t", strconv.Itoa(max(1, int(d.Seconds()))))
		return err
	}, func() error { return fmt.Errorf("it ended") })
	if err != nil {
		return 0, fmt.Errorf("iperf3: %w", err)
	}
	var report struct {
		End struct {
			Received struct {
				Bits float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return 0, fmt.Errorf("iperf3: %w", err)
	}
	return report.End.Received.Bits / 8 / GiB, p.Wait()
}
