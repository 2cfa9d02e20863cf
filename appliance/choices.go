package appliance

import (
	"fmt"
	"slices"
	"strings"
)

// A choice of the command line that names something which this version does not
// have is told from a misspelt one.

// CheckMode accepts "", auto, hybrid, precopy, postcopy and stop.
func CheckMode(s string) error {
	return checkChoice("mode", s, []string{"auto", "hybrid", "precopy", "postcopy", "stop"}, nil)
}

// CheckTrap accepts "", auto, uffd and fuse.
func CheckTrap(s string) error {
	return checkChoice("trap", s, []string{TrapAuto, TrapUFFD, TrapFUSE}, nil)
}

// CheckShown accepts "", drop and keep.
func CheckShown(s string) error {
	return checkChoice("shown", s, []string{ShownDrop, ShownKeep}, nil)
}

// CheckTransport accepts "", auto, rdma and tcp.
func CheckTransport(s string) error {
	return checkChoice("transport", s, []string{TransportAuto, TransportRDMA, TransportTCP}, nil)
}

// CheckCompress accepts "", auto, lz4 and none.
func CheckCompress(s string) error {
	return checkChoice("compress", s, []string{"auto", "lz4", "none"}, nil)
}

func checkChoice(what, s string, have, lack []string) error {
	switch {
	case s == "" || slices.Contains(have, s):
		return nil
	case slices.Contains(lack, s):
		return fmt.Errorf("%s %s is not in this version; it has %s", what, s, strings.Join(have, ", "))
	}
	return fmt.Errorf("%s %q is not known; it is one of %s", what, s, strings.Join(have, ", "))
}
