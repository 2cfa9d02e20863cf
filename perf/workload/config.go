package workload

import (
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/pageferry/pageferry/page"
)

// Pattern is the order in which a thread writes its pages.
type Pattern string

// The patterns.
const (
	Sequential Pattern = "sequential" // one after the other, in a circle
	Uniform    Pattern = "uniform"    // any page, each as likely
	Zipf       Pattern = "zipf"       // few pages often, most of them seldom
	// Edge increments one byte per page in a circle, so that every page equals
	// its neighbour but at one edge: one look finds any stale page.
	Edge Pattern = "edge"
)

// Data is what the pages hold.
type Data string

// The kinds of data.
const (
	Zero   Data = "zero"   // zero pages, which stay zeros when they are written
	Text   Data = "text"   // compresses well
	Random Data = "random" // does not compress
)

// Config says what to do. Its zero value is the documented default.
type Config struct {
	// Size is the memory in bytes. Default: 1 GiB.
	Size uint64
	// Threads is how many threads write and verify. Default: 1.
	Threads int
	// Rate is how many bytes per second are dirtied, over all threads.
	// Default: 100 MiB/s. Unlimited is as fast as it goes, Idle not at all.
	Rate int64
	// WorkingSet is how much of the memory is written, in bytes: the beginning of
	// each thread's part. Default: all of it.
	WorkingSet uint64
	// Pattern is the order of writes. Default: Uniform.
	Pattern Pattern
	// Data is what pages hold. Default: Random.
	Data Data
	// Whole rewrites a page's whole content at each write. Default: the
	// sequence number in its first and last eight bytes changes.
	Whole bool
	// NoVerify leaves out the verification that goes on all the time; what is
	// left is the one at the end.
	NoVerify bool
	// VerifyRate is how many bytes per second are verified, over all threads.
	// Default: 256 MiB/s. Unlimited is as fast as it goes.
	VerifyRate int64
	// Seed makes the data and the order. Default: 1.
	Seed uint64
	// Duration ends it by itself. Default: it runs until its context ends.
	Duration time.Duration
	// Interval is the time between two lines of output. Default: 1 s.
	Interval time.Duration
	// JSON writes lines of JSON. Default: lines for people.
	JSON bool
	// Heartbeat is where heartbeats go: "unix:PATH" or "udp:HOST:PORT", as
	// "beat IDENTITY COUNTER NONCE TEXT". Default: nowhere.
	Heartbeat string
	// Identity is what heartbeats are sent under. Default: a random one.
	Identity string
	// HeartbeatInterval is the time between them. Default: 5 ms.
	HeartbeatInterval time.Duration
	// Report is a file to which the outcome is written: "ok" or "bad ...".
	Report string
}

// Rates with a meaning of their own.
const (
	Unlimited int64 = -1
	Idle      int64 = -2
)

// EnsureDefaults replaces zero values by the defaults.
func (c *Config) EnsureDefaults() {
	set(&c.Size, 1<<30)
	set(&c.WorkingSet, c.Size)
	set(&c.Threads, 1)
	set(&c.Rate, 100<<20)
	set(&c.Pattern, Uniform)
	set(&c.Data, Random)
	set(&c.VerifyRate, 256<<20)
	set(&c.Seed, 1)
	set(&c.Interval, time.Second)
	set(&c.HeartbeatInterval, 5*time.Millisecond)
}

func set[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// ErrConfig is in the chain of what Validate returns.
var ErrConfig = errors.New("workload: bad configuration")

// Validate reports what is wrong with a configuration that has its defaults.
func (c *Config) Validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	switch c.Pattern {
	case Sequential, Uniform, Zipf, Edge:
	default:
		return bad("pattern %q: must be sequential, uniform, zipf or edge", c.Pattern)
	}
	switch c.Data {
	case Zero, Text, Random:
	default:
		return bad("data %q: must be zero, text or random", c.Data)
	}
	if c.Pattern == Edge && c.Whole {
		return bad("the pattern edge writes one byte per page, not whole pages")
	}
	if c.Threads < 1 || c.Threads > 10000 {
		return bad("%d threads: must be 1 to 10000", c.Threads)
	}
	if c.Size/page.Size < uint64(c.Threads) {
		return bad("%d bytes are less than a page for each of %d threads", c.Size, c.Threads)
	}
	if c.WorkingSet > c.Size || c.WorkingSet/page.Size < uint64(c.Threads) {
		return bad("a working set of %d bytes: must be a page for each of %d threads at least, and at most the memory, %d bytes", c.WorkingSet, c.Threads, c.Size)
	}
	if c.Size >= 1<<46 {
		return bad("%d bytes are more than an address space has", c.Size)
	}
	if c.Rate < Idle || c.VerifyRate < Unlimited {
		return bad("a rate is negative")
	}
	if c.Interval < 0 || c.HeartbeatInterval < 0 || c.Duration < 0 {
		return bad("a time is negative")
	}
	if _, _, err := splitAddress(c.Heartbeat); err != nil {
		return err
	}
	return nil
}

func splitAddress(s string) (network, addr string, err error) {
	if s == "" {
		return "", "", nil
	}
	network, addr, ok := strings.Cut(s, ":")
	switch {
	case ok && network == "unix" && addr != "":
		return "unixgram", addr, nil
	case ok && network == "udp" && addr != "":
		return "udp", addr, nil
	}
	return "", "", fmt.Errorf("%w: heartbeat %q: must be unix:PATH or udp:HOST:PORT", ErrConfig, s)
}

// AddFlags defines a flag for each field, with c's values as defaults.
func (c *Config) AddFlags(fs *flag.FlagSet) {
	all := c.WorkingSet == 0
	c.EnsureDefaults()
	if all { // of a size that is not yet known
		c.WorkingSet = 0
	}
	fs.Var((*sizeFlag)(&c.Size), "size", "memory, such as `1GiB`")
	fs.IntVar(&c.Threads, "threads", c.Threads, "threads that write and verify")
	fs.Var((*rateFlag)(&c.Rate), "rate", "memory dirtied per second, such as `100MiB/s`, or unlimited, or idle")
	fs.Var((*sizeFlag)(&c.WorkingSet), "working-set", "how much of the memory is written (0: all)")
	fs.StringVar((*string)(&c.Pattern), "pattern", string(c.Pattern), "sequential, uniform, zipf or edge")
	fs.StringVar((*string)(&c.Data), "data", string(c.Data), "zero, text or random")
	fs.BoolVar(&c.Whole, "whole", c.Whole, "rewrite a page's whole content at each write")
	fs.Var((*negated)(&c.NoVerify), "verify", "verify all memory all the time")
	fs.Var((*rateFlag)(&c.VerifyRate), "verify-rate", "memory verified per second, such as `256MiB/s`, or unlimited")
	fs.Uint64Var(&c.Seed, "seed", c.Seed, "seed of data and order")
	fs.DurationVar(&c.Duration, "duration", c.Duration, "end after that time (0: when SIGTERM or SIGINT comes)")
	fs.DurationVar(&c.Interval, "interval", c.Interval, "time between two lines of output")
	fs.BoolVar(&c.JSON, "json", c.JSON, "lines of JSON")
	fs.StringVar(&c.Heartbeat, "heartbeat", c.Heartbeat, "send heartbeats to unix:PATH or udp:HOST:PORT")
	fs.StringVar(&c.Identity, "identity", c.Identity, "identity in heartbeats (default a random one)")
	fs.DurationVar(&c.HeartbeatInterval, "heartbeat-interval", c.HeartbeatInterval, "time between two heartbeats")
	fs.StringVar(&c.Report, "report", c.Report, "write the outcome to that file")
}

type sizeFlag uint64

func (f *sizeFlag) String() string { return humanize.IBytes(uint64(*f)) }
func (f *sizeFlag) Set(s string) error {
	n, err := humanize.ParseBytes(s)
	*f = sizeFlag(n)
	return err
}

type rateFlag int64

func (f *rateFlag) String() string {
	switch int64(*f) {
	case Unlimited:
		return "unlimited"
	case Idle:
		return "idle"
	}
	return humanize.IBytes(uint64(*f)) + "/s"
}

func (f *rateFlag) Set(s string) error {
	switch s {
	case "unlimited":
		*f = rateFlag(Unlimited)
		return nil
	case "idle", "0":
		*f = rateFlag(Idle)
		return nil
	}
	n, err := humanize.ParseBytes(strings.TrimSuffix(s, "/s"))
	if err == nil && (n == 0 || n > 1<<60) {
		err = errors.New("out of range")
	}
	*f = rateFlag(n)
	return err
}

// negated is a boolean flag for the opposite of its variable.
type negated bool

func (f *negated) String() string   { return fmt.Sprint(!bool(*f)) }
func (f *negated) IsBoolFlag() bool { return true }
func (f *negated) Set(s string) error {
	switch s {
	case "true", "1":
		*f = false
	case "false", "0":
		*f = true
	default:
		return errors.New("must be true or false")
	}
	return nil
}
