package appliance

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// Size is a number of bytes; in text it carries a unit: 256KiB, 1GiB, 0.
type Size uint64

var sizeUnits = []struct {
	name  string
	bytes uint64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

func (s Size) String() string {
	for _, u := range sizeUnits {
		if uint64(s) >= u.bytes && uint64(s)%u.bytes == 0 {
			return strconv.FormatUint(uint64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10) + "B"
}

var sizePattern = regexp.MustCompile(`^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$`)

// ParseSize reads a size. Its error says what was probably meant.
func ParseSize(text string) (Size, error) {
	m := sizePattern.FindStringSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("%q is not a size; write a number and a unit, as in 256MiB", text)
	}
	num, unit := m[1], m[2]
	if unit == "" && num != "0" {
		return 0, fmt.Errorf("%q has no unit; write %sB, %sKiB, %sMiB or %sGiB", text, num, num, num, num)
	}
	factor := uint64(1)
	for _, u := range sizeUnits {
		if u.name == unit {
			factor = u.bytes
		}
	}
	if factor == 1 && unit != "B" && unit != "" {
		for _, u := range sizeUnits[:4] {
			if strings.EqualFold(unit[:1], u.name[:1]) {
				return 0, fmt.Errorf("%q: the unit %q is not known; write %s%s", text, unit, num, u.name)
			}
		}
		return 0, fmt.Errorf("%q: the unit %q is not known; it is one of B, KiB, MiB, GiB, TiB", text, unit)
	}
	if n, err := strconv.ParseUint(num, 10, 64); err == nil {
		if n > (1<<63)/factor {
			return 0, fmt.Errorf("%q is too large", text)
		}
		return Size(n * factor), nil
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || f*float64(factor) >= 1<<63 {
		return 0, fmt.Errorf("%q is too large", text)
	}
	return Size(f * float64(factor)), nil
}

// Set and Type make Size a flag's value.
func (s *Size) Set(text string) error {
	v, err := ParseSize(text)
	if err == nil {
		*s = v
	}
	return err
}

// Type is what a flag's help calls the value.
func (s *Size) Type() string { return "size" }

// MarshalYAML implements yaml.InterfaceMarshaler.
func (s Size) MarshalYAML() (any, error) { return s.String(), nil }

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (s *Size) UnmarshalYAML(node ast.Node) error {
	v, err := ParseSize(node.GetToken().Value)
	if err == nil {
		*s = v
	}
	return err
}
