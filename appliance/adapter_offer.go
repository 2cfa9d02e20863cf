package appliance

import (
	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/inspect"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// offer is what the destination must know, from an inspection.
func offer(rep *inspect.Report, opts SourceOptions) (migrate.Offer, error) {
	h, err := checkpoint.ThisHost()
	if err != nil {
		return migrate.Offer{}, err
	}
	mono, boot, err := checkpoint.Clocks(rep.PID)
	if err != nil {
		return migrate.Offer{}, err
	}
	st, err := proc.ReadStatus(rep.PID)
	if err != nil {
		return migrate.Offer{}, gone(err)
	}
	mode := opts.Mode
	if mode == "" {
		mode = migrate.ModePostCopy
	}
	return migrate.Offer{
		Mode: mode, HostPID: rep.PID, PID: rep.InnerPID, Comm: rep.Comm, Exe: rep.Exe,
		Threads: len(rep.Threads), MemoryBytes: rep.MemoryBytes, UID: rep.UID,
		PageSize: page.Size, XFeatures: h.XFeatures, XSize: h.XSize, Kernel: h.Kernel, Machine: h.Machine,
		Listeners: rep.Listeners, Files: rep.Files, MappedFiles: rep.MappedFiles, MappedBytes: mappedBytes(rep), Directories: rep.Directories,
		PIDNamespace: opts.PIDNamespace, PlainPages: opts.PlainPages, Lanes: opts.BulkLanes, Trap: opts.Trap, Keep: opts.Keep,
		Monotonic: mono, Boottime: boot, Addresses: opts.Addresses,
		PGID: innermost(st.NSPGID), SID: innermost(st.NSSID),
	}, nil
}

// mappedBytes is how much is mapped of each of rep.MappedFiles.
func mappedBytes(rep *inspect.Report) []uint64 {
	by := map[string]uint64{}
	for _, m := range rep.Mappings {
		if m.Kind == inspect.KindFile {
			by[fileid.Original(m.Path)] += m.End - m.Start
		}
	}
	out := make([]uint64, len(rep.MappedFiles))
	for i, f := range rep.MappedFiles {
		out[i] = by[f]
	}
	return out
}

// innermost is a number as the process itself sees it.
func innermost(ns []int) int {
	if len(ns) == 0 {
		return 0
	}
	return ns[len(ns)-1]
}
