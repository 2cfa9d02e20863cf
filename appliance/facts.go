package appliance

import (
	"fmt"
	"os"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/page"
)

// abilityFUSE: memory and files of an arriving process can be shown as files.
const abilityFUSE = "fuse"

// hostFacts finds out what this host's processor and kernel can do, by the
// doctor's own checks.
func hostFacts() (HostFacts, error) {
	h, err := checkpoint.ThisHost()
	if err != nil {
		return HostFacts{}, fmt.Errorf("what this processor is: %w", err)
	}
	f := HostFacts{Kernel: h.Kernel, Machine: h.Machine, XFeatures: h.XFeatures, XSize: h.XSize,
		PageSize: page.Size, Missing: map[string]string{}}
	if n := os.Getpagesize(); n != page.Size {
		return HostFacts{}, fmt.Errorf("pages here have %d bytes, this program is built for %d", n, page.Size)
	}
	for ability, check := range map[string]func() Finding{
		"userfaultfd":    checkUserfaultfd,
		"pidfd-getfd":    checkPidfdGetfd,
		"cgroup-freezer": checkFreezer,
		"time-namespace": checkTimeNamespace,
		abilityFUSE:      checkFUSE,
		"pid-namespace":  checkPIDNamespace,
		"posix-timer-restore": func() Finding {
			// PR_TIMER_CREATE_RESTORE_IDS (6.15). Before it timers get the
			// lowest free number, and are made until the right one comes.
			return Finding{Verdict: VerdictOK}
		},
	} {
		if x := check(); x.Verdict == VerdictOK {
			f.Abilities = append(f.Abilities, ability)
		} else {
			f.Missing[ability] = x.Found + "; " + x.Fix
		}
	}
	return f, nil
}
