package appliance

import (
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"

	"github.com/pageferry/pageferry/internal/yamlfile"
)

// DefaultPort is where daemons listen for their peers.
const DefaultPort = 7300

// DefaultSocket is where the API of a daemon with default configuration is.
const DefaultSocket = "/run/pageferry/api.sock"

// Config is a daemon's configuration. Its zero value is the documented default,
// but for one thing: either TLS or Insecure must be set, so that nobody runs
// without authentication by oversight.
type Config struct {
	// Name is how this host calls itself to peers. Default: the host name.
	Name string `yaml:"name"`
	// Listen is the address for peers. Default ":7300".
	Listen string `yaml:"listen"`
	// APIListen is the address at which the API is served to other hosts, under mutual TLS
	// to those whose certificate names one of Operators. Default: nowhere.
	APIListen string `yaml:"api_listen"`
	// Operators may use the API over the network, by the name in their certificate.
	Operators []string `yaml:"operators"`
	// TLS names the files for mutual TLS.
	TLS *TLSFiles `yaml:"tls"`
	// Insecure runs without TLS: anyone who reaches the port can put a process
	// here. Only for hosts that share a private link, such as those of a lab.
	Insecure bool `yaml:"insecure"`
	// PageLanes is "tls" or "plain"; "plain" leaves the pages unencrypted
	// while control stays under TLS, and both hosts must agree. Default "tls",
	// with Insecure "plain".
	PageLanes string `yaml:"page_lanes" oneof:"tls plain"`
	// StateDir holds what must survive a reboot: the journal and the reports.
	// Default /var/lib/pageferry.
	StateDir string `yaml:"state_dir" form:"path"`
	// RunDir holds sockets and what need not survive. Default /run/pageferry.
	RunDir string `yaml:"run_dir" form:"path"`
	// FilesDir is where files are kept that an arriving process has mapped and this host
	// lacks: it then maps the copy, which those of one user share and the kernel can drop
	// and read again. Nobody removes them. Processes must be able to reach the directory,
	// and have private memory instead where they cannot. Default: no copies, private
	// memory.
	FilesDir string `yaml:"files_dir" form:"path"`
	// Socket is the API's. Default: api.sock in run_dir.
	Socket string `yaml:"socket" form:"path"`
	// BulkLanes is how many connections carry the background pages of a migration
	// that does not say otherwise. 1 to 16, default 2.
	BulkLanes int `yaml:"bulk_lanes" min:"1" max:"16"`
	// Window bounds the bytes in flight on a bulk lane. 64 KiB to 16 MiB,
	// default 256 KiB: more makes faults queue behind background pages.
	Window Size `yaml:"window"`

	// Idle is "poll" or "sleep": what idle processors do from the moment that a
	// process is about to be frozen until all its pages have moved. Polling makes
	// the switch and every fault shorter, and costs power. Default "poll".
	Idle string `yaml:"idle" oneof:"poll sleep"`

	// SoftRoCE is what happens where page lanes could go over RDMA, but for a device
	// on the way to the peer: "off" nothing, "auto" one of soft-RoCE is made if the
	// kernel's module for it is loaded, "on" the module is loaded as well. The device
	// is removed when nobody needs it. Default "auto".
	SoftRoCE string `yaml:"soft_roce" oneof:"off auto on"`

	// Limits of what this host takes.
	Limits Limits `yaml:"limits"`
	// Defaults where a migration does not say otherwise.
	Defaults Defaults `yaml:"defaults"`
	// LogLevel is debug, info, warn or error. Default info.
	LogLevel string `yaml:"log_level" oneof:"debug info warn error"`
}

// Limits is what this host takes.
type Limits struct {
	// Incoming migrations at one time. Default 8.
	Incoming int `yaml:"incoming" min:"1"`
	// MemoryReserve stays free on this host whatever arrives. Default 256 MiB.
	MemoryReserve Size `yaml:"memory_reserve"`
	// Peers that may send processes here, by the name in their certificate.
	// Default: all whose certificate the authority signed.
	Peers []string `yaml:"peers"`
	// Reports of finished migrations that are kept. Default 200.
	Reports int `yaml:"reports" min:"1"`
}

// Defaults stand where a migration does not say otherwise.
type Defaults struct {
	Mode         string `yaml:"mode" oneof:"auto hybrid precopy postcopy stop"` // when pages move: auto (default), hybrid, precopy, postcopy or stop
	Transport    string `yaml:"transport" oneof:"auto rdma tcp"`                // what page lanes go over: auto (default), rdma or tcp
	TCP          string `yaml:"tcp" oneof:"refuse close"`                       // established connections: refuse (default) or close
	PIDNS        string `yaml:"pidns" oneof:"auto host new"`                    // where a process keeps its pid: auto (default), host or new
	OnSourceExit string `yaml:"on_source_exit" oneof:"kill exit0 stop-unit"`    // how the copy at the source ends: kill (default), exit0 or stop-unit
	// Shown is drop (default) or keep: what shows a process's memory as files stays until
	// "pageferry release".
	Shown string `yaml:"shown" oneof:"drop keep"`
	// MaxBandwidth limits the page lanes of each migration, as in 10Gbit or
	// 500MiB per second; none is the default.
	MaxBandwidth string `yaml:"max_bandwidth" form:"bandwidth"`
}

// WithDefaults is c with every unset field at its default.
func (c Config) WithDefaults(hostname string) Config {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&c.Name, hostname)
	set(&c.Listen, ":"+strconv.Itoa(DefaultPort))
	if c.Insecure {
		set(&c.PageLanes, "plain")
	}
	set(&c.PageLanes, "tls")
	set(&c.StateDir, "/var/lib/pageferry")
	set(&c.RunDir, "/run/pageferry")
	set(&c.Socket, filepath.Join(c.RunDir, "api.sock"))
	set(&c.Defaults.Mode, modeAuto)
	set(&c.Defaults.Transport, TransportAuto)
	set(&c.Defaults.TCP, "refuse")
	set(&c.Defaults.PIDNS, "auto")
	set(&c.Defaults.OnSourceExit, "kill")
	set(&c.Defaults.Shown, ShownDrop)
	set(&c.LogLevel, "info")
	set(&c.Idle, "poll")
	set(&c.SoftRoCE, SoftAuto)
	if c.BulkLanes == 0 {
		c.BulkLanes = 2
	}
	if c.Window == 0 {
		c.Window = 256 << 10
	}
	if c.Limits.Incoming == 0 {
		c.Limits.Incoming = 8
	}
	if c.Limits.MemoryReserve == 0 {
		c.Limits.MemoryReserve = 256 << 20
	}
	if c.Limits.Reports == 0 {
		c.Limits.Reports = 200
	}
	return c
}

// Validate says what is wrong, first things first; unset fields are right. The
// error is a *FieldError.
func (c *Config) Validate() error {
	bad := func(field, format string, args ...any) error {
		return &FieldError{Field: field, Msg: fmt.Sprintf(format, args...)}
	}
	for field, listen := range map[string]string{"listen": c.Listen, "api_listen": c.APIListen} {
		if listen == "" {
			continue
		}
		_, port, err := net.SplitHostPort(listen)
		if err != nil {
			return bad(field, "%q is not HOST:PORT or :PORT", listen)
		}
		if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
			return bad(field, "%q is not a port number", port)
		}
	}
	if err := c.validateAPI(bad); err != nil {
		return err
	}
	switch {
	case c.TLS == nil && !c.Insecure:
		return bad("tls", "is missing; name ca, cert and key (\"pageferry keys\" makes them), or say \"insecure: true\" on a private link")
	case c.TLS != nil && c.Insecure:
		return bad("insecure", "contradicts tls; leave one of them out")
	case c.TLS != nil:
		for _, f := range []struct{ name, path string }{{"ca", c.TLS.CA}, {"cert", c.TLS.Cert}, {"key", c.TLS.Key}} {
			if f.path == "" {
				return bad("tls", "%s is missing", f.name)
			}
		}
	}
	if err := yamlfile.CheckTags(c); err != nil {
		return err
	}
	if c.Insecure && c.PageLanes == "tls" {
		return bad("page_lanes", "tls needs keys, and insecure has none")
	}
	for _, f := range []struct{ field, path string }{
		{"state_dir", c.StateDir}, {"run_dir", c.RunDir}, {"socket", c.Socket}, {"files_dir", c.FilesDir},
	} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			return bad(f.field, "%q is not an absolute path", f.path)
		}
	}
	// sun_path holds 108 bytes with its terminating zero (unix(7)).
	if len(c.Socket) > 107 {
		return bad("socket", "is longer than the 107 bytes of a unix socket's path")
	}
	if c.Window != 0 && (c.Window < 64<<10 || c.Window > 16<<20) {
		return bad("window", "%s is not between 64KiB and 16MiB", c.Window)
	}
	for _, p := range c.Limits.Peers {
		if p == "" {
			return bad("limits.peers", "holds an empty name")
		}
	}
	if len(c.Limits.Peers) > 0 && c.Insecure {
		return bad("limits.peers", "needs tls: without it a peer has no name")
	}
	if _, err := ParseBandwidth(c.Defaults.MaxBandwidth); err != nil {
		return bad("defaults.max_bandwidth", "%v", err)
	}
	return nil
}

// Level is LogLevel for slog.
func (c *Config) Level() slog.Level {
	var l slog.Level
	if c.LogLevel != "" {
		_ = l.UnmarshalText([]byte(c.LogLevel)) // Validate has seen it; info otherwise
	}
	return l
}
