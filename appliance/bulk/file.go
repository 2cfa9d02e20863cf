package bulk

import (
	"cmp"
	"maps"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/yamlfile"
)

// APIPort is where a daemon's API is reached from other hosts, unless the file
// says otherwise.
const APIPort = 7301

// DefaultRetries is how often one process is tried again.
const DefaultRetries = 2

// What happens to the rest when a process could not be moved.
const (
	OnFailureContinue = "continue"
	OnFailureStop     = "stop"
	OnFailureReturn   = "return"
)

// The comments at the fields below are also the descriptions in
// configs/schema/bulk.json, for whoever writes such a file.

// File is what "pageferry bulk plan|run|status FILE" reads. Load returns it
// validated; it is not changed afterwards, so that all may read it concurrently.
type File struct {
	// Name of the run, in reports and in status. Default: the file's name without its ending.
	Name string `yaml:"name,omitempty" form:"name"`
	// TLS names the files by which this run shows the daemons who it is; they must have the certificate's name among their operators.
	TLS TLS `yaml:"tls" need:"1"`
	// Hosts by the names in their daemons' certificates.
	Hosts map[string]Host `yaml:"hosts" need:"2"`
	// Evacuate lists the hosts from which everything that a group selects must go, and to which nothing comes.
	Evacuate []string `yaml:"evacuate,omitempty"`
	// Groups of processes that move in the same way.
	Groups []Group `yaml:"groups" need:"1"`
	// Budget of the page lanes of all migrations together, per second: 1Gbit, 100MiB. Default: none.
	Budget string `yaml:"budget,omitempty" form:"bandwidth"`
	// Limits of how many migrations there are at one time.
	Limits Limits `yaml:"limits,omitempty"`
	// Retries of each process whose migration failed and which runs on where it was, 0 to 100. Default 2.
	Retries *int `yaml:"retries,omitempty" min:"0" max:"100"`
	// Deadline of the whole run, from its beginning: 2h. Nothing begins after it; what has begun goes on. Default: none.
	Deadline Duration `yaml:"deadline,omitempty"`
	// Window of the day within which migrations begin. Default: any time.
	Window *Window `yaml:"window,omitempty"`
	// OnFailure is continue (with the others), stop (begin nothing more) or return (begin nothing more, and bring back what has moved), when a process could not be moved. Default continue.
	OnFailure string `yaml:"on_failure,omitempty" oneof:"continue stop return"`
}

// TLS are the paths of PEM files: the authority, and the certificate and key of
// who asks.
type TLS = appliance.TLSFiles

// Host is a host with a daemon.
type Host struct {
	// Address at which the other daemons reach this one, HOST or HOST:PORT. Default port 7300.
	Address string `yaml:"address" need:"1"`
	// API at which the daemon is asked, HOST or HOST:PORT. Default: the same host, port 7301.
	API string `yaml:"api,omitempty"`
	// Capacity is what may arrive in this run; what runs there already is not counted. Default: no limit but the daemon's.
	Capacity Capacity `yaml:"capacity,omitempty"`
}

// Capacity of a host for what arrives.
type Capacity struct {
	// Memory of all processes that arrive: 64GiB. 0 is no limit, the default.
	Memory appliance.Size `yaml:"memory,omitempty"`
	// Processes that arrive. 0 is no limit, the default.
	Processes int `yaml:"processes,omitempty" min:"0"`
}

// Limits of migrations at one time; 0 is no limit but the daemons'.
type Limits struct {
	// AtOnce is how many migrations there are in all. 0 is no limit, the default.
	AtOnce int `yaml:"at_once,omitempty" min:"0"`
	// PerHost is how many leave or enter one host. 0 is no limit, the default.
	PerHost int `yaml:"per_host,omitempty" min:"0"`
	// PerLink is how many go from one host to the same other. 0 is no limit, the default.
	PerLink int `yaml:"per_link,omitempty" min:"0"`
}

// Load reads and validates the file at path. Its error begins with
// file:line:column where a place is at fault.
func Load(path string) (*File, error) {
	f, err := yamlfile.Load[File](path)
	if err != nil {
		return nil, err
	}
	return f.named(path), nil
}

// Parse is Load for bytes at hand; name stands in errors, and is the run's name
// where the file has none.
func Parse(name string, data []byte) (*File, error) {
	f, err := yamlfile.Decode[File](name, data)
	if err != nil {
		return nil, err
	}
	return f.named(name), nil
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// named sets the default name.
func (f File) named(path string) *File {
	if f.Name == "" {
		base := filepath.Base(path)
		base = notInNames.ReplaceAllString(strings.TrimSuffix(base, filepath.Ext(base)), "-")
		base = strings.TrimLeft(base[:min(len(base), maxName)], "._-")
		f.Name = cmp.Or(base, "bulk")
	}
	return &f
}

// Text is the file as Parse reads it, on one line: YAML in the form of JSON, which
// quotes every text, so that none is taken for something else.
func (f *File) Text() ([]byte, error) { return yaml.MarshalWithOptions(f, yaml.JSON()) }

// Peer is where other daemons reach the host, HOST:PORT.
func (h Host) Peer() string { return withPort(h.Address, appliance.DefaultPort) }

// Endpoint is where the host's daemon is asked, HOST:PORT.
func (h Host) Endpoint() string {
	if h.API != "" {
		return withPort(h.API, APIPort)
	}
	host, _, _ := splitAddress(h.Address)
	return net.JoinHostPort(host, strconv.Itoa(APIPort))
}

// Destinations of a group in order of preference: its own, or all hosts that are
// not evacuated, by name.
func (f *File) Destinations(g *Group) []string {
	if len(g.To) > 0 {
		return slices.Clone(g.To)
	}
	hosts := slices.Sorted(maps.Keys(f.Hosts))
	return slices.DeleteFunc(hosts, func(h string) bool { return slices.Contains(f.Evacuate, h) })
}

// RetriesOf is how often a process of the group is tried again; g may be nil, for
// the file's own.
func (f *File) RetriesOf(g *Group) int {
	switch {
	case g != nil && g.Retries != nil:
		return *g.Retries
	case f.Retries != nil:
		return *f.Retries
	}
	return DefaultRetries
}

// OnFailureOf is what happens when a process of the group could not be moved; g
// may be nil, for the file's own.
func (f *File) OnFailureOf(g *Group) string {
	own := ""
	if g != nil {
		own = g.OnFailure
	}
	return cmp.Or(own, f.OnFailure, OnFailureContinue)
}

// DeadlineOf is the time from the beginning of the run after which nothing of the
// group begins, 0 for none: the earlier of the group's and the file's.
func (f *File) DeadlineOf(g *Group) time.Duration {
	whole, own := time.Duration(f.Deadline), time.Duration(0)
	if g != nil {
		own = time.Duration(g.Deadline)
	}
	if own == 0 || whole == 0 {
		return max(own, whole)
	}
	return min(own, whole)
}

// BudgetBytes is Budget in bytes per second, 0 for none.
func (f *File) BudgetBytes() float64 {
	b, _ := appliance.ParseBandwidth(f.Budget) // Validate has seen it
	return float64(b)
}
