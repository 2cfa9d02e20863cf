package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Environment is what figures depend on and the benchmarks do not choose.
type Environment struct {
	CPU        string
	Processors int
	Memory     uint64 // bytes
	Kernel     string
	THP        string
	Go         string
	Load       string  // the load averages at the start
	Busy       float64 // processors that others used during a look at the start
	Steal      float64 // processors that the host took away meanwhile
}

// look is how long others are watched.
const look = 500 * time.Millisecond

// LookAround describes this machine. It takes half a second, in which nothing
// else of the program should run.
func LookAround() Environment {
	e := Environment{Processors: runtime.NumCPU(), Go: runtime.Version(), CPU: "unknown", Kernel: "unknown"}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if k, v, _ := strings.Cut(sc.Text(), ":"); strings.TrimSpace(k) == "model name" {
				e.CPU = strings.TrimSpace(v)
				break
			}
		}
		f.Close()
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		e.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		e.Memory, _ = kib(b, "MemTotal")
	}
	e.THP = "none"
	if b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled"); err == nil {
		if _, rest, ok := strings.Cut(string(b), "["); ok {
			e.THP, _, _ = strings.Cut(rest, "]")
		}
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		e.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	before, began := readStat(), time.Now()
	time.Sleep(look) // what others do in this time is what is asked
	after := readStat()
	ticks := time.Since(began).Seconds() * 100 // USER_HZ is 100 on every Linux architecture of ours
	e.Busy = float64(after.busy-before.busy) / ticks
	e.Steal = float64(after.steal-before.steal) / ticks
	return e
}

// Quiet says what is wrong where others use this machine, and "" where they do
// not.
func (e *Environment) Quiet() string {
	var load float64
	_, _ = fmt.Sscan(e.Load, &load)
	switch {
	case e.Busy > 0.1*float64(e.Processors):
		return fmt.Sprintf("others use %.1f of %d processors: these figures mean little", e.Busy, e.Processors)
	case e.Steal > 0.05*float64(e.Processors):
		return fmt.Sprintf("the host takes away %.1f of %d processors: these figures mean little", e.Steal, e.Processors)
	case load > 0.5*float64(e.Processors):
		return fmt.Sprintf("the load average is %.1f: the machine may not be quiet", load)
	}
	return ""
}

// Print writes the environment as lines that benchstat understands.
func (e *Environment) Print(w io.Writer) {
	fmt.Fprintf(w, "processor: %s\nprocessors: %d\nmemory: %d MiB\nkernel: %s\nthp: %s\ngo: %s\nload: %s, others use %.2f processors, stolen %.2f\n",
		e.CPU, e.Processors, e.Memory>>20, e.Kernel, e.THP, e.Go, e.Load, e.Busy, e.Steal)
	if q := e.Quiet(); q != "" {
		fmt.Fprintf(w, "warning: %s\n", q)
	}
}

type stat struct{ busy, steal uint64 } // ticks of all processors

func readStat() (s stat) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return s
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	for i, f := range bytes.Fields(line) {
		n, err := strconv.ParseUint(string(f), 10, 64)
		if err != nil {
			continue
		}
		switch i { // proc(5): cpu user nice system idle iowait irq softirq steal
		case 1, 2, 3, 6, 7:
			s.busy += n
		case 8:
			s.steal += n
		}
	}
	return s
}
