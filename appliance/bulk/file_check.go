package bulk

import (
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/yamlfile"
)

const maxName = 64

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// hostForm is wider: certificates may come from other authorities, and be for
// addresses.
var hostForm = regexp.MustCompile(`^[A-Za-z0-9:][A-Za-z0-9._:-]*$`)

// bad returns "field: message" with its place.
func bad(field, format string, args ...any) error {
	return &yamlfile.FieldError{Field: field, Msg: fmt.Sprintf(format, args...)}
}

// first returns the first error.
func first(checks ...func() error) error {
	for _, c := range checks {
		if err := c(); err != nil {
			return err
		}
	}
	return nil
}

// Validate says what is wrong, first things first. The error is a
// *yamlfile.FieldError.
func (f *File) Validate() error {
	return first(
		func() error { return yamlfile.CheckTags(f) },
		func() error { return checkName("name", f.Name, false) },
		f.checkTLS, f.checkHosts, f.checkEvacuate, f.checkWhole, f.checkGroups, f.checkOrder,
	)
}

func checkName(field, name string, needed bool) error {
	switch {
	case name == "" && needed:
		return bad(field, "is missing; write a name, by which after and reports speak of it")
	case name == "":
	case len(name) > maxName:
		return bad(field, "is longer than %d bytes", maxName)
	case !nameForm.MatchString(name):
		return bad(field, "%q is no name; write letters, digits, dots, dashes and underscores, a letter or digit first", name)
	}
	return nil
}

func (f *File) checkTLS() error {
	for _, x := range []struct{ key, path string }{{"ca", f.TLS.CA}, {"cert", f.TLS.Cert}, {"key", f.TLS.Key}} {
		if x.path == "" {
			return bad("tls", "%s is missing; name ca, cert and key (\"pageferry keys issue\" makes them), whose name the daemons have among their operators", x.key)
		}
	}
	return nil
}

func (f *File) checkHosts() error {
	if len(f.Hosts) == 0 {
		return bad("hosts", "is missing; name the hosts, each with its address")
	}
	peers, apis := map[string]string{}, map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(f.Hosts)) {
		h, field := f.Hosts[name], "hosts."+name
		if !hostForm.MatchString(name) {
			return bad(field, "%q is no name of a host; write it as in the certificate of its daemon", name)
		}
		if h.Address == "" {
			return bad(field, "address is missing; write HOST or HOST:PORT")
		}
		if _, _, err := splitAddress(h.Address); err != nil {
			return bad(field+".address", "%v", err)
		}
		if _, _, err := splitAddress(h.API); h.API != "" && err != nil {
			return bad(field+".api", "%v", err)
		}
		if other := peers[h.Peer()]; other != "" {
			return bad(field+".address", "%s is that of %s", h.Peer(), other)
		}
		if other := apis[h.Endpoint()]; other != "" {
			return bad(field+".api", "%s is that of %s", h.Endpoint(), other)
		}
		peers[h.Peer()], apis[h.Endpoint()] = name, name
	}
	if len(f.Hosts) == 1 {
		return bad("hosts", "is one host; a migration takes two")
	}
	return nil
}

func (f *File) checkEvacuate() error {
	if err := f.checkNames("evacuate", f.Evacuate); err != nil {
		return err
	}
	if len(f.Evacuate) == len(f.Hosts) {
		return bad("evacuate", "is all hosts; none is left to go to")
	}
	return nil
}

// checkNames checks a list of hosts.
func (f *File) checkNames(field string, hosts []string) error {
	for i, h := range hosts {
		at := fmt.Sprintf("%s[%d]", field, i)
		if err := f.checkHost(at, h); err != nil {
			return err
		}
		if slices.Contains(hosts[:i], h) {
			return bad(at, "%s is in the list already", h)
		}
	}
	return nil
}

func (f *File) checkHost(field, name string) error {
	if _, ok := f.Hosts[name]; ok {
		return nil
	}
	names := slices.Sorted(maps.Keys(f.Hosts))
	if len(names) > 8 {
		names = append(names[:8:8], "...")
	}
	return bad(field, "%q is none of hosts: %s", name, strings.Join(names, ", "))
}

// checkWhole checks what is said of the run as a whole.
func (f *File) checkWhole() error {
	if _, err := appliance.ParseBandwidth(f.Budget); err != nil {
		return bad("budget", "%v", err)
	}
	if f.Deadline < 0 {
		return bad("deadline", "%s is negative", f.Deadline)
	}
	if f.Window == nil {
		return nil
	}
	for _, x := range []struct{ key, text string }{{"from", f.Window.From}, {"to", f.Window.To}} {
		if err := checkClock(x.text); err != nil {
			return bad("window."+x.key, "%v", err)
		}
	}
	if f.Window.From == f.Window.To {
		return bad("window.to", "is the same as from; leave window out for the whole day")
	}
	if _, err := time.LoadLocation(f.Window.zoneName()); err != nil {
		return bad("window.zone", "%q is not known; write one such as Europe/Berlin or UTC", f.Window.Zone)
	}
	return nil
}

// withPort is an address as HOST:PORT; the address is valid.
func withPort(address string, port int) string {
	host, own, _ := splitAddress(address)
	if own == "" {
		own = strconv.Itoa(port)
	}
	return net.JoinHostPort(host, own)
}

// splitAddress takes HOST, HOST:PORT, [IPv6] or [IPv6]:PORT apart; port is "" where
// there is none.
func splitAddress(s string) (host, port string, err error) {
	wrong := fmt.Errorf("%q is not HOST or HOST:PORT", s)
	if host, port, err = net.SplitHostPort(s); err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"), ""
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return "", "", wrong
		}
	} else if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
		return "", "", fmt.Errorf("%q: %q is not a port number", s, port)
	}
	if host == "" || strings.ContainsAny(host, " \t\r\n/[]@") {
		return "", "", wrong
	}
	return host, port, nil
}
