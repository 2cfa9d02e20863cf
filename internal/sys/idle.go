package sys

import (
	"fmt"
	"os"
)

// StayAwake keeps idle processors of the host from sleeping until the file is
// closed, by whatever means: they poll for work, and begin it sooner by the time
// that waking takes (some microseconds; tens of them in a virtual machine). It is
// the latency constraint of the kernel's power management quality of service
// (Documentation/power/pm_qos_interface.rst), which needs root.
func StayAwake() (*os.File, error) {
	f, err := os.OpenFile("/dev/cpu_dma_latency", os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("keep processors awake: %w", err)
	}
	if _, err := f.Write(make([]byte, 4)); err != nil { // an int32: no microsecond
		f.Close()
		return nil, fmt.Errorf("keep processors awake: %w", err)
	}
	return f, nil
}
