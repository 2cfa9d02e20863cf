package appliance

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/pageferry/pageferry/transport/pace"
)

// Bandwidth is a limit in bytes per second; 0 is none. In text it carries a
// unit: 10Gbit, 500Mbit, 100MiB.
type Bandwidth uint64

// noBandwidth is how a request takes back the daemon's default limit.
const noBandwidth = "none"

// Bits are counted in powers of ten and bytes in powers of two, as on network
// devices and in memory.
var bandwidthUnits = []struct {
	name  string
	bytes float64
}{
	{"Tbit", 1e12 / 8}, {"Gbit", 1e9 / 8}, {"Mbit", 1e6 / 8}, {"kbit", 1e3 / 8}, {"bit", 1. / 8},
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1},
}

var bandwidthPattern = regexp.MustCompile(`^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*(?:/s)?\s*$`)

// ParseBandwidth reads a limit; "" and "none" are 0. Its error says what was
// probably meant.
func ParseBandwidth(text string) (Bandwidth, error) {
	if text == "" || text == noBandwidth {
		return 0, nil
	}
	m := bandwidthPattern.FindStringSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("%q is not a bandwidth; write a number and a unit, as in 10Gbit or 500MiB, or none", text)
	}
	num, unit := m[1], m[2]
	factor := 0.0
	for _, u := range bandwidthUnits {
		// B and b are too easily taken for each other.
		if strings.EqualFold(u.name, unit) && (u.name != "B" || unit == "B") {
			factor = u.bytes
		}
	}
	if factor == 0 {
		return 0, fmt.Errorf("%q: %s; write %s", text, unitTrouble(unit), meantUnits(num, unit))
	}
	n, err := strconv.ParseFloat(num, 64)
	if err != nil || n*factor > pace.Max {
		return 0, fmt.Errorf("%q is more than any link carries", text)
	}
	if n*factor < pace.Min {
		return 0, fmt.Errorf("%q is less than 1Mbit, below which no limit holds within 5 %% in every second; write 1Mbit or more, or none for no limit", text)
	}
	return Bandwidth(math.Round(n * factor)), nil
}

func unitTrouble(unit string) string {
	if unit == "" {
		return "the unit is missing"
	}
	return fmt.Sprintf("the unit %q is not known", unit)
}

// meantUnits lists what a number with an unknown unit may stand for.
func meantUnits(num, unit string) string {
	if unit == "" {
		return fmt.Sprintf("%sMbit, %sGbit, %sMiB or %sGiB", num, num, num, num)
	}
	bits, bytes := "bit", "iB"
	switch p := strings.ToUpper(unit[:1]); p {
	case "K":
		bits, bytes = "kbit", "KiB"
	case "M", "G", "T":
		bits, bytes = p+"bit", p+"iB"
	case "B":
		bytes = "B"
	default:
		return "one of bit, kbit, Mbit, Gbit, B, KiB, MiB, GiB behind the number"
	}
	return fmt.Sprintf("%s%s for bits or %s%s for bytes per second", num, bits, num, bytes)
}

// String is the limit as ParseBandwidth reads it, in bits where that is round.
func (b Bandwidth) String() string {
	if b == 0 {
		return noBandwidth
	}
	bit, byte := unitOf(float64(b), true), unitOf(float64(b), false)
	if len(bit) <= len(byte) {
		return bit
	}
	return byte
}

// unitOf is n bytes per second, exactly, in the largest unit of bits or bytes
// that leaves at most one decimal.
func unitOf(n float64, bits bool) string {
	for _, u := range bandwidthUnits {
		x := n / u.bytes
		if strings.HasSuffix(u.name, "bit") == bits && x >= 1 && x*10 == math.Trunc(x*10) {
			return strconv.FormatFloat(x, 'f', -1, 64) + u.name
		}
	}
	return strconv.FormatFloat(n, 'f', -1, 64) + "B"
}

// Text says in bits and in bytes what was understood.
func (b Bandwidth) Text() string {
	if b == 0 {
		return "no limit"
	}
	in := func(bits bool) string {
		for _, u := range bandwidthUnits {
			if x := float64(b) / u.bytes; strings.HasSuffix(u.name, "bit") == bits && x >= 1 {
				s := strings.TrimSuffix(strings.TrimRight(strconv.FormatFloat(x, 'f', 2, 64), "0"), ".")
				return s + " " + u.name + "/s"
			}
		}
		return "0"
	}
	return in(true) + " (" + in(false) + ")"
}
