package appliance

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/migrate"
)

// follow takes over what a running migration says.
func (r *Report) follow(p migrate.Progress) {
	r.State = p.State
	if p.Role == migrate.RoleDestination {
		r.DestPID, r.SourcePID, r.Mode = p.PID, p.SourcePID, string(p.Mode)
	}
	if p.Comm != "" {
		r.Comm = p.Comm
	}
	if p.BytesMemory != 0 {
		r.BytesMemory = p.BytesMemory
	}
	r.TotalMS = ms(p.Elapsed)
	r.BytesWire = max(p.BytesWire, p.ArrivalStats.BytesWire)
	r.PagesTotal, r.PagesResident, r.PagesZero = p.PagesTotal, p.PagesResident, p.PagesZero
	r.PagesFaulted, r.PagesDouble, r.PagesOneSided = p.PagesFaulted, p.PagesDouble, p.PagesOneSided
	r.Faults = Faults{Count: p.PagesFaulted, P50us: p.FaultP50us, P99us: p.FaultP99us, MaxUS: p.FaultMaxus}
	r.Reason = p.Reason
	if p.Round > 0 {
		r.Round, r.PagesLeft, r.Throttle = p.Round, p.PagesLeft, p.Throttle
		r.DirtyRate, r.WireRate, r.ExpectedMS = p.DirtyBytesPerSecond, p.WireBytesPerSecond, ms(p.ExpectedDowntime)
	}
}

// result takes over what was measured in the end.
func (r *Report) result(s migrate.Result) {
	r.State, r.DestPID, r.Reason = s.StateText, s.DestPID, s.Reason
	r.TotalMS, r.DowntimeMS, r.SwitchMS, r.ResidentMS = s.TotalMS, s.DowntimeMS, s.SwitchMS, s.ResidentMS
	if s.BytesMemory != 0 {
		r.BytesMemory = s.BytesMemory
	}
	r.BytesWire, r.PagesTotal, r.PagesSent = s.BytesWire, s.PagesTotal, s.PagesSent
	r.PagesOneSided = s.PagesOneSided
	r.PagesDouble, r.PagesZero, r.PagesFaulted, r.PagesResident = s.PagesResent, s.PagesZero, s.PagesFaulted, s.PagesResident
	r.PagesResent = s.PagesResent
	r.Rounds = r.Rounds[:0]
	for _, x := range s.Rounds {
		r.Rounds = append(r.Rounds, Round{x.Round, x.Pages, x.PagesZero, x.DirtyPages, x.BytesWire, x.MS})
	}
	r.Saved = s.Saved
	r.PagesCompressed = s.Saved.LZ4.Pages + s.Saved.Delta.Pages
	r.Throttle = s.Throttle
	r.Tracker, r.SwitchReason = s.Tracker, s.Switch
	if s.Predicted != nil {
		r.Predicted = s.Predicted
	}
	if s.Chosen != "" {
		r.Mode = string(s.Chosen)
		r.Remarks = append(r.Remarks, fmt.Sprintf("mode: %s, chosen by auto: %s", s.Chosen, s.ChosenWhy))
	}
	r.Faults = Faults(s.Faults)
}

// goesOver takes over what the page lanes go over, in place of what it was before.
func (r *Report) goesOver(name, remark string) {
	r.Transport = name
	r.Remarks = slices.DeleteFunc(slices.Clone(r.Remarks), func(s string) bool { return strings.HasPrefix(s, remarkTransport) })
	if remark != "" {
		r.Remarks = append(r.Remarks, remarkTransport+remark)
	}
}

// remarkTransport begins the remark about the transport; there is one.
const remarkTransport = "transport: "
