package appliance

import (
	"strings"
	"testing"

	"github.com/pageferry/pageferry/transport/pace"
)

func TestBandwidth(t *testing.T) {
	for text, want := range map[string]Bandwidth{
		"": 0, "none": 0, "1Mbit": 125e3, "10Gbit": 1250e6, "2.5Gbit": 312.5e6, "1 gbit/s": 125e6, "800000kbit": 100e6,
		"1000000bit": 125e3, "1MiB": 1 << 20, "1.2GiB/s": 1288490189, "200000B": 200000, "500mbit/s": 62.5e6,
	} {
		if got, err := ParseBandwidth(text); err != nil || got != want {
			t.Errorf("ParseBandwidth(%q) = %d, %v; want %d", text, uint64(got), err, uint64(want))
		}
	}
	for text, want := range map[string]string{
		"10":                           "unit is missing; write 10Mbit, 10Gbit, 10MiB or 10GiB",
		"10G":                          `the unit "G" is not known; write 10Gbit for bits or 10GiB for bytes per second`,
		"10GB":                         "write 10Gbit for bits or 10GiB",
		"10Gb":                         "write 10Gbit for bits or 10GiB",
		"200000b":                      "write 200000bit for bits or 200000B",
		"5furlong":                     "one of bit, kbit",
		"-1Gbit":                       "is not a bandwidth; write a number and a unit",
		"fast":                         "is not a bandwidth",
		"1e9bit":                       "is not a bandwidth",
		"999kbit":                      "less than 1Mbit",
		"0Gbit":                        "none for no limit",
		"99999999Tbit":                 "more than any link carries",
		strings.Repeat("9", 400) + "B": "more than any link carries",
	} {
		if got, err := ParseBandwidth(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseBandwidth(%q) = %d, %v; want %q", text, uint64(got), err, want)
		}
	}
	for b, want := range map[Bandwidth][2]string{
		0:          {"none", "no limit"},
		1250e6:     {"10Gbit", "10 Gbit/s (1.16 GiB/s)"},
		125e3:      {"1Mbit", "1 Mbit/s (122.07 KiB/s)"},
		100 << 20:  {"100MiB", "838.86 Mbit/s (100 MiB/s)"},
		312.5e6:    {"2.5Gbit", "2.5 Gbit/s (298.02 MiB/s)"},
		1288490189: {"1288490189B", "10.31 Gbit/s (1.2 GiB/s)"},
	} {
		if b.String() != want[0] || b.Text() != want[1] {
			t.Errorf("%d prints as %q and %q, want %q", uint64(b), b.String(), b.Text(), want)
		}
		if again, err := ParseBandwidth(b.String()); err != nil || again != b {
			t.Errorf("%s is read as %d, %v", b, uint64(again), err)
		}
	}
}

func FuzzParseBandwidth(f *testing.F) {
	f.Add("10Gbit")
	f.Add("1.5 MiB/s")
	f.Fuzz(func(t *testing.T, text string) {
		b, err := ParseBandwidth(text)
		if err != nil {
			return
		}
		if again, err := ParseBandwidth(b.String()); err != nil || again != b {
			t.Errorf("%q is %d and prints as %s, which is %d, %v", text, uint64(b), b, uint64(again), err)
		}
		if _, err := pace.New(pace.Config{BytesPerSecond: uint64(b)}); err != nil && b != 0 {
			t.Errorf("%q cannot be enforced: %v", text, err)
		}
	})
}

// TestHintOfLanes: what a process says of itself carries how its pages go to the
// next daemon, and how they went is no part of who it is.
func TestHintOfLanes(t *testing.T) {
	o := SourceOptions{TCP: "close", OnSourceExit: "exit0", BulkLanes: 5, MaxBandwidth: 1250e6}
	hint := "start 7 boot b" + hintTCP + o.TCP + hintExit + o.OnSourceExit + hintLanes(o)
	again := SourceOptions{Hint: []byte(hint)}
	if who := recall(&again); who != "start 7 boot b" || again.TCP != "close" || again.OnSourceExit != "exit0" {
		t.Errorf("%q, %+v", who, again)
	}
	if _, as := recallLanes(hint); as.BulkLanes != 5 || as.MaxBandwidth != 1250e6 {
		t.Errorf("%+v", as)
	}
	for _, other := range []string{"", "start 7 boot b tcp=close exit=kill", hint + "x", "a lanes=1", "a lanes=x bandwidth=1", "a lanes=1 bandwidth=1"} {
		if rest, as := recallLanes(other); as.BulkLanes != 0 || as.MaxBandwidth != 0 || len(rest) > len(other) {
			t.Errorf("%q: %q, %+v", other, rest, as)
		}
	}
}
