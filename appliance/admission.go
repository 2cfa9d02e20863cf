package appliance

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/migrate"
)

// arrivalOverhead is what an arriving process needs besides its own memory:
// pager, buffers, page tables.
const arrivalOverhead = 96 << 20

// baseAbilities are needed whatever is offered.
var baseAbilities = []string{"userfaultfd", "pidfd-getfd", "cgroup-freezer"}

// admission decides what this host takes. It looks at the host through fields
// that tests replace.
type admission struct {
	facts   HostFacts
	limits  Limits
	plain   bool // page lanes without TLS
	memory  func() (uint64, error)
	running func() int    // migrations arriving now
	claimed func() uint64 // bytes promised to them that have not arrived yet

	pidBusy    func(pid int) bool
	hasAddress func(netip.Addr) bool
	portFree   func(network string, a netip.AddrPort) error
	stat       func(path string) (os.FileInfo, error)
	// mapsFiles: what is only mapped privately can be had from the source; keepsFiles:
	// and is kept on the disk then.
	mapsFiles, keepsFiles bool
}

func newAdmission(facts HostFacts, c Config) *admission {
	return &admission{
		facts: facts, limits: c.Limits, plain: c.PageLanes == "plain",
		memory:     availableMemory,
		running:    func() int { return 0 },
		claimed:    func() uint64 { return 0 },
		pidBusy:    func(pid int) bool { _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); return err == nil },
		hasAddress: hostHasAddress,
		portFree:   portFree,
		stat:       os.Stat,
		mapsFiles:  slices.Contains(facts.Abilities, abilityFUSE),
		keepsFiles: c.FilesDir != "",
	}
}

// check is nil, or a *migrate.Refusal with every reason that there is: whoever
// asked should not have to come back once per reason.
func (a *admission) check(o migrate.Offer) error {
	var why []string
	no := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }

	if n := a.running(); n >= a.limits.Incoming {
		no("%d migrations are arriving here already, which is the limit (limits.incoming)", n)
	}
	if !o.Mode.Known() {
		no("mode %q is not known here", o.Mode)
	}
	if o.PageSize != a.facts.PageSize {
		no("its pages have %d bytes, pages here %d", o.PageSize, a.facts.PageSize)
	}
	if o.Machine != a.facts.Machine {
		no("it runs on %s, this host is %s", o.Machine, a.facts.Machine)
	} else {
		if lack := o.XFeatures &^ a.facts.XFeatures; lack != 0 {
			no("it has processor state that this processor lacks: %s", xfeatureNames(lack))
		} else if o.XSize != a.facts.XSize {
			no("its processor state has %d bytes per thread, here it has %d", o.XSize, a.facts.XSize)
		}
	}
	for _, ability := range append(slices.Clone(baseAbilities), o.Requires...) {
		if slices.Contains(a.facts.Abilities, ability) {
			continue
		}
		if reason := a.facts.Missing[ability]; reason != "" {
			no("this host lacks %s: %s", ability, reason)
		} else {
			no("this host lacks %s", ability)
		}
	}
	if o.PlainPages != a.plain {
		no("page lanes are %s there and %s here; page_lanes must be the same in both configurations",
			laneWord(o.PlainPages), laneWord(a.plain))
	}
	switch o.Trap {
	case "", TrapAuto, TrapUFFD:
	case TrapFUSE:
		if !slices.Contains(a.facts.Abilities, abilityFUSE) {
			no("trap fuse is not possible here: %s", cmp.Or(a.facts.Missing[abilityFUSE], "this host lacks fuse"))
		}
	default:
		no("trap %q is not known here", o.Trap)
	}
	a.checkMemory(o, no)
	a.checkListeners(o, no)
	a.checkFiles(o, no)
	switch o.PIDNamespace {
	case "", "auto", "new":
	case "host":
		if a.pidBusy(o.PID) {
			no("pid %d is taken here; --pidns new gives it a namespace in which it is free", o.PID)
		}
	default:
		no("pid namespace %q is not known here", o.PIDNamespace)
	}
	if len(why) > 0 {
		return &migrate.Refusal{Reasons: why}
	}
	return nil
}

func laneWord(plain bool) string {
	if plain {
		return "plain"
	}
	return "tls"
}

func (a *admission) checkMemory(o migrate.Offer, no func(string, ...any)) {
	free, err := a.memory()
	if err != nil {
		no("how much memory is free here cannot be told: %v", err)
		return
	}
	keep := uint64(a.limits.MemoryReserve) + a.claimed()
	files, twice := a.lackingBytes(o), uint64(0)
	if o.Trap == TrapFUSE {
		twice = o.MemoryBytes / 10 * 3
	}
	need := o.MemoryBytes + arrivalOverhead + files + twice
	if free < keep || free-keep < o.MemoryBytes || free-keep < need {
		what := ""
		if files > 0 {
			what = fmt.Sprintf(", %s of that for files that are not here", mib(files))
		}
		if twice > 0 {
			what += fmt.Sprintf(", %s of that for what trap fuse has twice until it is settled", mib(twice))
		}
		no("it needs %s of memory%s, %s are free here, of which %s are reserved",
			mib(need), what, mib(free), mib(keep))
	}
}

// lackingBytes is how much memory o takes for files that are not here: in the end, they
// are memory of the process.
func (a *admission) lackingBytes(o migrate.Offer) (n uint64) {
	if !a.mapsFiles || a.keepsFiles || o.Trap == TrapUFFD {
		return 0
	}
	for i, bytes := range o.MappedBytes {
		if i == len(o.MappedFiles) {
			break
		}
		if _, err := a.stat(o.MappedFiles[i]); err != nil {
			n += min(bytes, 1<<48) // it may be any number
		}
	}
	return n
}

func mib(bytes uint64) string {
	if bytes >= 1<<30 {
		return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
	}
	return fmt.Sprintf("%d MiB", bytes>>20)
}

func (a *admission) checkListeners(o migrate.Offer, no func(string, ...any)) {
	for _, l := range o.Listeners {
		network, address, ok := strings.Cut(l, " ")
		ap, err := netip.ParseAddrPort(address)
		if !ok || err != nil {
			no("its listener %q is not understood", l)
			continue
		}
		addr := ap.Addr().Unmap()
		if s, ok := o.Addresses[addr.String()]; ok {
			if addr, err = netip.ParseAddr(s); err != nil {
				no("it is to listen on %q in place of %s, which is no address", s, ap.Addr())
				continue
			}
			ap = netip.AddrPortFrom(addr, ap.Port())
			l = network + " " + ap.String()
		}
		if !addr.IsUnspecified() && !a.hasAddress(addr) {
			no("it listens on %s, an address that this host lacks; --address %s=NEW gives it another", l, addr)
			continue
		}
		if err := a.portFree(network, ap); err != nil {
			no("it listens on %s, which is taken here: %v", l, err)
		}
	}
}

func (a *admission) checkFiles(o migrate.Offer, no func(string, ...any)) {
	for _, f := range o.Files {
		switch fi, err := a.stat(f); {
		case err != nil:
			no("it has %s open or mapped, which is not here: %v", f, pathCause(err))
		case fi.IsDir():
			no("it has the file %s, which is a directory here", f)
		}
	}
	var how string // it could be taken along
	switch {
	case !a.mapsFiles:
		how = "; it would come along if this host had FUSE: " + cmp.Or(a.facts.Missing[abilityFUSE], "which is not known")
	case o.Trap == TrapUFFD:
		how = "; --trap auto takes it along"
	}
	for _, f := range o.MappedFiles {
		if how == "" {
			break
		}
		switch fi, err := a.stat(f); {
		case err != nil:
			no("it has mapped or executes %s, which is not here: %v%s", f, pathCause(err), how)
		case !fi.Mode().IsRegular():
			no("it has mapped or executes the file %s, which is a directory or a device here%s", f, how)
		}
	}
	for _, d := range o.Directories {
		switch fi, err := a.stat(d); {
		case err != nil:
			no("it stands in or has open the directory %s, which is not here: %v", d, pathCause(err))
		case !fi.IsDir():
			no("it has the directory %s, which is no directory here", d)
		}
	}
}

// pathCause leaves out the path that a *PathError repeats.
func pathCause(err error) error {
	if pe, ok := err.(*os.PathError); ok {
		return pe.Err
	}
	return err
}

// xfeatureNames spells out bits of XCR0 (Intel SDM volume 1, 13.3).
func xfeatureNames(bits uint64) string {
	names := map[int]string{0: "x87", 1: "SSE", 2: "AVX", 3: "MPX bounds", 4: "MPX config", 5: "AVX-512 masks",
		6: "AVX-512 upper halves", 7: "AVX-512 upper registers", 9: "protection keys", 17: "AMX config", 18: "AMX tiles", 19: "APX"}
	var out []string
	for i := range 64 {
		if bits&(1<<i) == 0 {
			continue
		}
		if n := names[i]; n != "" {
			out = append(out, n)
		} else {
			out = append(out, fmt.Sprintf("bit %d", i))
		}
	}
	return strings.Join(out, ", ")
}

func hostHasAddress(want netip.Addr) bool {
	if want.IsLoopback() {
		return true // 127.0.0.0/8 is local as a whole
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == want.WithZone("") {
			return true
		}
	}
	return false
}
