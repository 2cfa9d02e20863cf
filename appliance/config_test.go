package appliance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestConfigErrorsSayWhereAndWhat(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "insecure: true\nlisten_on: \":7\"\n", "f.yaml:2:1: unknown field \"listen_on\""},
		{"near key", "insecure: true\nbulk-lanes: 2\n", "did you mean \"bulk_lanes\"?"},
		{"near nested", "insecure: true\nlimits:\n  incomming: 2\n", "f.yaml:3:3: unknown field \"incomming\"; did you mean \"incoming\"?"},
		{"duplicate", "insecure: true\nname: a\nname: b\n", "f.yaml:3:1: "},
		{"no unit", "insecure: true\nwindow: 256\n", "f.yaml:2:9: \"256\" has no unit; write 256B, 256KiB"},
		{"wrong unit", "insecure: true\nlimits:\n  memory_reserve: 1GB\n", "f.yaml:3:19: \"1GB\": the unit \"GB\" is not known; write 1GiB"},
		{"wrong type", "insecure: true\nbulk_lanes: many\n", "f.yaml:2:13: "},
		{"mode", "insecure: true\ndefaults:\n  mode: precpy\n", "f.yaml:3:9: defaults.mode: \"precpy\" is not known; it is one of auto, hybrid, precopy, postcopy, stop"},
		{"bandwidth", "insecure: true\ndefaults:\n  max_bandwidth: 10GB\n", "f.yaml:3:18: defaults.max_bandwidth: \"10GB\": the unit \"GB\" is not known; write 10Gbit"},
		{"bandwidth without unit", "insecure: true\ndefaults: {max_bandwidth: 10}\n", "unit is missing"},
		{"range", "insecure: true\nwindow: 1GiB\n", "f.yaml:2:9: window: 1GiB is not between"},
		{"port", "insecure: true\nlisten: host\n", "f.yaml:2:9: listen: \"host\" is not HOST:PORT"},
		{"both", "insecure: true\ntls: {ca: a, cert: b, key: c}\n", "insecure: contradicts tls"},
		{"neither", "name: a\n", "f.yaml: tls: is missing"},
		{"empty", "", "f.yaml: tls: is missing"},
		{"half", "tls: {ca: a, cert: b}\n", "tls: key is missing"},
		{"relative", "insecure: true\nrun_dir: x\n", "run_dir: \"x\" is not an absolute path"},
		{"syntax", "insecure: [\n", "f.yaml:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseConfig("f.yaml", []byte(c.text))
			if err == nil {
				t.Fatalf("accepted %q", c.text)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got  %v\nwant %s", err, c.want)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("more than one line: %q", err)
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	c, err := ParseConfig("f.yaml", []byte("insecure: true\n"))
	if err != nil {
		t.Fatal(err)
	}
	d := c.WithDefaults("here")
	if d.Name != "here" || d.Listen != ":7300" || d.Socket != DefaultSocket || d.PageLanes != "plain" ||
		d.BulkLanes != 2 || d.Window != 256<<10 || d.Defaults.Mode != "auto" {
		t.Fatalf("defaults are %+v", d)
	}
	if err := d.Validate(); err != nil {
		t.Fatalf("the defaults are refused: %v", err)
	}
	if d := (Config{TLS: &TLSFiles{"a", "b", "c"}}).WithDefaults("x"); d.PageLanes != "tls" {
		t.Fatalf("page lanes under TLS default to %q", d.PageLanes)
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "1B": 1, "256KiB": 256 << 10, "1.5GiB": 3 << 29, "2 MiB": 2 << 20, "1TiB": 1 << 40} {
		got, err := ParseSize(text)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1B", "1", "1GB", "1g", "99999999TiB", "x", "1e9B", "99999999999999999999B"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", text, got)
		}
	}
	for want, s := range map[string]Size{"0B": 0, "256KiB": 256 << 10, "1537B": 1537, "3GiB": 3 << 30} {
		if s.String() != want {
			t.Errorf("%d prints as %s, want %s", uint64(s), s, want)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("insecure: true\nlimits: {incoming: 3}\n"))
	f.Fuzz(func(t *testing.T, data []byte) { _, _ = ParseConfig("f", data) })
}

// TestSamples loads every file of configs/ that is a daemon's.
func TestSamples(t *testing.T) {
	files, err := filepath.Glob("../configs/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no samples found: %v", err)
	}
	for _, f := range files {
		if strings.HasPrefix(filepath.Base(f), "bulk-") {
			continue // a test of appliance/bulk loads those
		}
		if _, err := LoadConfig(f); err != nil {
			t.Error(err)
		}
		if data, err := os.ReadFile(f); err != nil || !strings.HasPrefix(string(data), "#") {
			t.Errorf("%s does not begin with a comment that says what it is for (%v)", f, err)
		}
	}
}
