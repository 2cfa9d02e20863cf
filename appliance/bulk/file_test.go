package bulk

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

func TestSamples(t *testing.T) {
	files, err := filepath.Glob("../../configs/bulk-*.yaml")
	if err != nil || len(files) < 6 {
		t.Fatalf("samples found: %v, %v", files, err)
	}
	for _, path := range files {
		f, err := Load(path)
		if err != nil {
			t.Error(err)
			continue
		}
		if want := strings.TrimSuffix(filepath.Base(path), ".yaml"); f.Name != want && f.Name != "spring-cleaning" {
			t.Errorf("%s is named %q", path, f.Name)
		}
		if data, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(data), "#") {
			t.Errorf("%s does not begin with a comment that says what it is for (%v)", path, err)
		}
	}
}

func TestDefaults(t *testing.T) {
	f, err := Parse("/etc/my move.yaml", []byte(head+tail))
	if err != nil {
		t.Fatal(err)
	}
	g := &f.Groups[0]
	if f.Name != "my-move" || f.RetriesOf(g) != 2 || f.OnFailureOf(g) != "continue" || f.DeadlineOf(g) != 0 || f.BudgetBytes() != 0 {
		t.Errorf("defaults are %q, %d, %q, %s, %v", f.Name, f.RetriesOf(g), f.OnFailureOf(g), f.DeadlineOf(g), f.BudgetBytes())
	}
	if got := f.Destinations(g); !reflect.DeepEqual(got, []string{"a", "b", "c"}) {
		t.Errorf("it may go to %v", got)
	}
	for name, want := range map[string]string{".yaml": "bulk", "///": "bulk", "x.y.yaml": "x.y", strings.Repeat("x", 100): strings.Repeat("x", 64)} {
		if f, err := Parse(name, []byte(head+tail)); err != nil || f.Name != want || f.Validate() != nil {
			t.Errorf("%q makes %+v, %v; want %q", name, f, err, want)
		}
	}
}

func TestWhatGroupsTakeFromTheFile(t *testing.T) {
	f, err := Parse("f.yaml", []byte(head+`
evacuate: [b]
retries: 5
deadline: 2h
budget: 80Mbit
on_failure: stop
groups:
  - {name: own, select: [{unit: x}], retries: 0, deadline: 90m, on_failure: return, to: [c, a]}
  - {name: longer, select: [{unit: y}], deadline: 3h}
`))
	if err != nil {
		t.Fatal(err)
	}
	own, longer := &f.Groups[0], &f.Groups[1]
	if f.RetriesOf(own) != 0 || f.RetriesOf(longer) != 5 || f.RetriesOf(nil) != 5 {
		t.Errorf("retries are %d, %d, %d", f.RetriesOf(own), f.RetriesOf(longer), f.RetriesOf(nil))
	}
	if f.DeadlineOf(own) != 90*time.Minute || f.DeadlineOf(longer) != 2*time.Hour || f.DeadlineOf(nil) != 2*time.Hour {
		t.Errorf("deadlines are %s, %s, %s", f.DeadlineOf(own), f.DeadlineOf(longer), f.DeadlineOf(nil))
	}
	if f.OnFailureOf(own) != "return" || f.OnFailureOf(longer) != "stop" || f.OnFailureOf(nil) != "stop" {
		t.Errorf("on failure: %s, %s, %s", f.OnFailureOf(own), f.OnFailureOf(longer), f.OnFailureOf(nil))
	}
	if got := f.Destinations(own); !reflect.DeepEqual(got, []string{"c", "a"}) {
		t.Errorf("own may go to %v", got)
	}
	if got := f.Destinations(longer); !reflect.DeepEqual(got, []string{"a", "c"}) {
		t.Errorf("longer may go to %v", got)
	}
	if f.BudgetBytes() != 1e7 {
		t.Errorf("the budget is %v bytes per second", f.BudgetBytes())
	}
}

func TestAddresses(t *testing.T) {
	for _, c := range []struct {
		host           Host
		peer, endpoint string
	}{
		{Host{Address: "h"}, "h:7300", "h:7301"},
		{Host{Address: "h:1"}, "h:1", "h:7301"},
		{Host{Address: "h:1", API: "i"}, "h:1", "i:7301"},
		{Host{Address: "h", API: "i:2"}, "h:7300", "i:2"},
		{Host{Address: "::1"}, "[::1]:7300", "[::1]:7301"},
		{Host{Address: "[::1]"}, "[::1]:7300", "[::1]:7301"},
		{Host{Address: "[fe80::1%eth0]:5"}, "[fe80::1%eth0]:5", "[fe80::1%eth0]:7301"},
	} {
		if c.host.Peer() != c.peer || c.host.Endpoint() != c.endpoint {
			t.Errorf("%+v is reached at %s and %s; want %s and %s", c.host, c.host.Peer(), c.host.Endpoint(), c.peer, c.endpoint)
		}
	}
}

// Aliases and merge keys spare repetition; what they bring is checked as well, and
// must not be given twice.
func TestAliases(t *testing.T) {
	text := head + `
groups:
  - {name: x, select: [{unit: x}], <<: &how {mode: precopy, throttle: 0.5}}
  - name: y
    select: [{unit: y}]
    <<: *how
`
	f, err := Parse("f.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if y := f.Groups[1]; y.Name != "y" || y.Mode != "precopy" || y.Throttle != 0.5 || y.Select[0].Unit != "y" {
		t.Fatalf("y is %+v", y)
	}
	for what, want := range map[[2]string]string{
		{"mode:", "mod:"}:                          "f.yaml:8:46: unknown field \"mod\"",
		{"0.5", "5"}:                               "f.yaml:8:71: groups[0].throttle: 5 is no part",
		{"<<: *how", "<<: 3"}:                      "f.yaml:11:9: 3 is no section",
		{"<<: *how", "<<: *hov"}:                   "f.yaml:11:9: ",
		{"    <<: *", "    mode: stop\n    <<: *"}: "duplicate key \"mode\"",
	} {
		_, err = Parse("f.yaml", []byte(strings.Replace(text, what[0], what[1], 1)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("with %q: %v; want %s", what[1], err, want)
		}
	}
}

func TestRequest(t *testing.T) {
	g := Group{Mode: "precopy", Trap: "uffd", Transport: "tcp", TCP: "close", Compress: "lz4", Shown: "drop", MaxBandwidth: "1Gbit",
		MaxDowntime: Duration(50 * time.Millisecond), Throttle: 0.3, PIDNS: "new", OnSourceExit: "exit0", Addresses: map[string]string{"10.0.0.1": "10.0.0.2"}}
	want := appliance.MigrateRequest{PID: 7, To: "b:7300", Mode: "precopy", Trap: "uffd", Transport: "tcp", TCP: "close", Compress: "lz4", Shown: "drop",
		MaxBandwidth: "1Gbit", MaxDowntimeMS: 50, Throttle: 0.3, PIDNS: "new", OnSourceExit: "exit0", Addresses: map[string]string{"10.0.0.1": "10.0.0.2"}}
	if got := g.Request(7, "b:7300"); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// FuzzParse: no file brings the program down, and one that is accepted stays
// what it is when it is written and read again.
func FuzzParse(f *testing.F) {
	f.Add([]byte(head + tail))
	f.Add([]byte(group("mode: precopy\n    throttle: 0.25\n    max_downtime: 1m0.5s\n    retries: 0\n    addresses: {10.0.0.1: '::1'}")))
	f.Add([]byte(head + tail + "window: {from: 22:00, to: '06:00', zone: Europe/Berlin}\nbudget: 1Gbit\nlimits: {at_once: 3}\n"))
	f.Add([]byte("hosts: &h {a: *h}\n<<: *h\n"))
	f.Add([]byte("groups: [[{{]}\n"))
	f.Add([]byte(selecting("host: a, pid: 1}, {command: \"r\\u0000*\", label: a=b")))
	samples, _ := filepath.Glob("../../configs/bulk-*.yaml")
	for _, s := range samples {
		if data, err := os.ReadFile(s); err == nil {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		one, err := Parse("fuzz.yaml", data)
		if err != nil {
			return
		}
		if err := one.Validate(); err != nil {
			t.Fatalf("accepted, but not valid: %v", err)
		}
		text, err := one.Text()
		if err != nil {
			t.Fatal(err)
		}
		two, err := Parse("fuzz.yaml", text)
		if err != nil {
			t.Fatalf("%v\nwritten as\n%s", err, text)
		}
		again, err := two.Text()
		if err != nil || string(again) != string(text) {
			t.Fatalf("is\n%s\nand, read and written again (%v),\n%s", text, err, again)
		}
	})
}
