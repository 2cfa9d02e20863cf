package appliance

import (
	"cmp"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/migrate"
)

// options resolves a request against the configuration's defaults.
func (d *Daemon) options(req MigrateRequest) (SourceOptions, error) {
	usage := func(format string, args ...any) (SourceOptions, error) {
		return SourceOptions{}, &UsageError{Msg: fmt.Sprintf(format, args...)}
	}
	or := func(s, def string) string {
		if s == "" || s == "auto" {
			return def
		}
		return s
	}
	o := SourceOptions{
		Mode:         migrate.Mode(or(req.Mode, d.config.Defaults.Mode)),
		Trap:         or(req.Trap, "auto"),
		Transport:    or(req.Transport, d.config.Defaults.Transport),
		TCP:          or(req.TCP, d.config.Defaults.TCP),
		Addresses:    req.Addresses,
		PIDNamespace: req.PIDNS,
		OnSourceExit: or(req.OnSourceExit, d.config.Defaults.OnSourceExit),
		PlainPages:   d.config.PageLanes == "plain",
		MaxDowntime:  time.Duration(req.MaxDowntimeMS * float64(time.Millisecond)),
		Throttle:     req.Throttle,
		AddressOrder: req.AddressOrder,
		Keep:         or(req.Shown, d.config.Defaults.Shown) == ShownKeep,
		BulkLanes:    cmp.Or(req.Lanes, d.config.BulkLanes),
		Logger:       d.log,
	}
	if o.PIDNamespace == "" {
		o.PIDNamespace = d.config.Defaults.PIDNS
	}
	if req.PID <= 0 {
		return usage("%d is no process id", req.PID)
	}
	if _, err := peerAddress(req.To); err != nil {
		return usage("%v", err)
	}
	if err := CheckMode(string(o.Mode)); err != nil {
		return usage("%v", err)
	}
	if !(req.MaxDowntimeMS >= 0 && req.MaxDowntimeMS < 1e9) || !(o.Throttle >= 0 && o.Throttle < 1) {
		return usage("a downtime of %v ms or a throttle of %v cannot be", req.MaxDowntimeMS, o.Throttle)
	}
	if o.Mode == modeAuto {
		o.Mode, o.Auto = migrate.ModeHybrid, true
	}
	if o.Throttle > 0 && o.Mode != migrate.ModePreCopy {
		return usage("a throttle steers precopy, the mode is %s", o.modeText())
	}
	if o.MaxDowntime > 0 && !o.Mode.Rounds() {
		return usage("a bound of the downtime steers hybrid and precopy, the mode is %s", o.Mode)
	}
	if err := CheckTrap(o.Trap); err != nil {
		return usage("%v", err)
	}
	if o.Trap == TrapUFFD {
		if req.Shown == ShownKeep {
			return usage("nothing is shown with trap uffd, so nothing can be kept; leave one of the two out")
		}
		o.Keep = false // the default is for what is shown
	}
	if err := CheckTransport(req.Transport); err != nil {
		return usage("%v", err)
	}
	if err := CheckCompress(req.Compress); err != nil {
		return usage("%v", err)
	}
	if req.Compress != "" {
		o.Compress, _ = codec.ParseMode(req.Compress) // it was just checked
	}
	limit := or(req.MaxBandwidth, d.config.Defaults.MaxBandwidth)
	check := Defaults{TCP: o.TCP, PIDNS: o.PIDNamespace, OnSourceExit: o.OnSourceExit, Shown: req.Shown, MaxBandwidth: limit}
	c := Config{Insecure: true, BulkLanes: o.BulkLanes, Defaults: check}
	if err := c.Validate(); err != nil {
		return usage("%v", err)
	}
	o.MaxBandwidth, _ = ParseBandwidth(limit) // Validate has seen it
	return o, nil
}

// modeAuto stands for the choice of the model.
const modeAuto = "auto"

// modeText is the mode as it was asked for.
func (o *SourceOptions) modeText() string {
	if o.Auto {
		return modeAuto
	}
	return string(o.Mode)
}
