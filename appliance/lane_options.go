package appliance

import (
	"cmp"
	"strconv"
	"strings"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/pace"
)

// laneOptions says how the lanes of migration id to the daemon at to are made.
func (h *handover) laneOptions(id transport.MigrationID, to string, opts SourceOptions) (lo LaneOptions, err error) {
	lo = LaneOptions{Migration: id, Address: to, BulkLanes: opts.BulkLanes, Compress: opts.Compress,
		IdleSleep: h.d.config.Idle == "sleep", Transport: opts.Transport, Fabric: h.d.fabric, Logger: h.d.log}
	if !opts.PlainPages {
		lo.TLS = h.d.config.TLS
	}
	if opts.MaxBandwidth != 0 {
		lo.Limiter, err = pace.New(pace.Config{BytesPerSecond: uint64(opts.MaxBandwidth)})
	}
	return lo, err
}

// What is in the description of a process for its journal about how its pages
// are to go.
const (
	hintLaneCount = " lanes="
	hintBandwidth = " bandwidth="
	hintCompress  = " compress="
	hintTrap      = " trap="
	hintShown     = " shown="
	hintTransport = " transport="
)

// hintLanes goes at the end of a description.
func hintLanes(o SourceOptions) string {
	return hintLaneCount + strconv.Itoa(o.BulkLanes) + hintBandwidth + strconv.FormatUint(uint64(o.MaxBandwidth), 10) +
		hintCompress + o.Compress.String() + hintTrap + o.Trap + hintShown + shownText(o.Keep) + hintTransport + o.Transport
}

// recallLanes cuts what hintLanes said from a description, and returns the rest.
// A daemon of before has said nothing, and then all is zero.
func recallLanes(hint string) (rest string, as SourceOptions) {
	rest, said, ok := strings.Cut(hint, hintLaneCount)
	lanes, said, whole := strings.Cut(said, hintBandwidth)
	if !ok || !whole {
		return hint, as
	}
	limit, how, _ := strings.Cut(said, hintCompress)
	how, trap, _ := strings.Cut(how, hintTrap)
	trap, shown, _ := strings.Cut(trap, hintShown)
	shown, over, _ := strings.Cut(shown, hintTransport)
	n, err := strconv.ParseUint(lanes, 10, 8)
	b, errB := strconv.ParseUint(limit, 10, 64)
	mode, errM := codec.ParseMode(cmp.Or(how, codec.Auto.String())) // an earlier daemon did not say
	if err != nil || errB != nil || errM != nil || CheckTrap(trap) != nil || CheckShown(shown) != nil || CheckTransport(over) != nil || b != 0 && (b < pace.Min || b > pace.Max) {
		return rest, as
	}
	as.BulkLanes, as.MaxBandwidth, as.Compress, as.Trap = int(n), Bandwidth(b), mode, trap
	as.Keep, as.Transport = shown == ShownKeep, over
	return rest, as
}
