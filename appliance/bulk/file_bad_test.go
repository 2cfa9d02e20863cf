package bulk

import (
	"strings"
	"testing"
)

// head is what every file of the table begins with, 5 lines.
const head = `tls: {ca: /k/ca.pem, cert: /k/me.pem, key: /k/me-key.pem}
hosts:
  a: {address: a.example}
  b: {address: b.example}
  c: {address: c.example}
`

// tail is a right group, for files whose mistake is elsewhere.
const tail = "groups: [{name: g, select: [{unit: redis}]}]\n"

// group is a file whose only group has more keys; they begin in line 9, column 5.
func group(keys string) string {
	return head + "groups:\n  - name: g\n    select: [{unit: redis}]\n    " + keys + "\n"
}

// selecting is a file with one selector, which begins in line 7, column 25.
func selecting(s string) string { return head + "groups:\n  - {name: g, select: [{" + s + "}]}\n" }

// badFiles is also what the schema is held against.
var badFiles = []struct{ name, text, at, want string }{
	{"empty", "", "", "tls: ca is missing"},
	{"only a comment", "# nothing\n", "", "tls: ca is missing"},
	{"no section", "- a\n", "1:1", "not a section"},
	{"syntax", "hosts: [\n", "1:8", ""},
	{"tab", "hosts:\n\ta: {address: x}\n", "2:1", ""},
	{"second document", head + tail + "---\nname: x\n", "8:5", "second document"},
	{"tag", "name: !!str x\n" + head + tail, "1:7", "the tag !!str is not wanted"},
	{"unknown anchor", head + tail + "name: *x\n", "7:7", "x"},
	{"anchor in itself", head + tail + "evacuate: &x [*x]\n", "7:14", "a list is not text"},
	{"too deep", "name: " + strings.Repeat("[", 1000), "1:71", "nested deeper than 64"},
	{"too deep by dashes", strings.Repeat("- ", 1000), "1:129", "nested deeper than 64"},
	{"too many anchors", strings.Repeat("&a ", 1000), "1:194", "nested deeper than 64"},
	{"too large", strings.Repeat("# no\n", 250000), "", "larger than 1048576 bytes"},

	{"unknown key", head + tail + "retrys: 2\n", "7:1", `did you mean "retries"?`},
	{"unknown key like none", head + tail + "zebra: 2\n", "7:1", "there are name, tls, hosts"},
	{"unknown key with a dash", head + tail + "on-failure: stop\n", "7:1", `did you mean "on_failure"?`},
	{"key of another section", head + tail + "at_once: 2\n", "7:1", `did you mean "groups[].at_once"?`},
	{"unknown key in limits", head + tail + "limits: {per_hosts: 2}\n", "7:10", `did you mean "per_host"?`},
	{"unknown key in a group", group("mod: stop"), "9:5", `did you mean "mode"?`},
	{"unknown key in a selector", selecting("units: redis"), "7:25", `did you mean "unit"?`},
	{"unknown key in a host", "hosts: {a: {adress: x}}\n", "1:13", `did you mean "address"?`},
	{"duplicate key", head + tail + "name: x\nname: y\n", "8:1", "already defined"},
	{"duplicate host", "hosts:\n  a: {address: x}\n  a: {address: y}\n", "3:3", "already defined"},
	{"duplicate key in a group", group("mode: stop\n    mode: hybrid"), "10:5", "already defined"},

	{"text for a number", head + tail + "retries: many\n", "7:10", `"many" is not a whole number`},
	{"part of a number", group("at_once: 1.5"), "9:14", "1.5 is not a whole number"},
	{"number for a truth", group("optional: 1"), "9:15", "1 is not true or false"},
	{"yes for a truth", group("optional: yes"), "9:15", `"yes" is not true or false`},
	{"text for a part", group("throttle: half"), "9:15", `"half" is not a number`},
	{"truth for text", group("mode: true"), "9:11", "put it into quotes"},
	{"octal for text", selecting("user: 0100"), "7:31", `put it into quotes: "0100"`},
	{"text for a list", head + tail + "evacuate: a\n", "7:11", `not a list; write ["a"]`},
	{"list for text", group("mode: [stop]"), "9:11", "a list is not text"},
	{"section for a list", head + tail + "evacuate: {a: b}\n", "7:11", "not a list"},
	{"list for a section", head + tail + "limits: [1]\n", "7:9", "not a section"},
	{"list for hosts", "hosts: [a, b]\n" + tail, "1:8", "write NAME: ..."},
	{"text for a group", head + "groups: [g]\n", "6:10", "not a section"},
	{"no value", head + tail + "budget:\n", "7:1", "has no value"},
	{"no value in a selector", selecting("user: root, command: "), "7:37", "has no value"},
	{"no value in a list", head + tail + "evacuate: [a, ~]\n", "7:15", "has no value"},

	{"tls without key", "tls: {ca: x, cert: y}\n", "1:6", "key is missing"},
	{"tls in a block", "tls:\n  ca: x\n", "1:1", "cert is missing"},
	{"name", "name: a/b\n" + head + tail, "1:7", "is no name"},
	{"no hosts", "tls: {ca: x, cert: y, key: z}\n" + tail, "", "hosts: is missing"},
	{"one host", "tls: {ca: x, cert: y, key: z}\nhosts: {a: {address: x}}\n" + tail, "2:8", "a migration takes two"},
	{"no address", strings.Replace(head, "{address: b.example}", "{}", 1) + tail, "4:6", "hosts.b: address is missing"},
	{"bad address", strings.Replace(head, "b.example", "b.example/x", 1) + tail, "4:16", "is not HOST or HOST:PORT"},
	{"bad port", strings.Replace(head, "b.example", "b.example:70000", 1) + tail, "4:16", "not a port number"},
	{"bad api", strings.Replace(head, "{address: b.example", "{address: b.example, api: ':'", 1) + tail, "4:32", "api"},
	{"same address", strings.Replace(head, "b.example", "a.example", 1) + tail, "4:16", "a.example:7300 is that of a"},
	{"same api", strings.Replace(head, "b.example", "b.example, api: a.example", 1) + tail, "4:32", "a.example:7301 is that of a"},
	{"name of a host", strings.Replace(head, "  b:", "  'b c':", 1) + tail, "4:10", "is no name of a host"},
	{"memory without unit", strings.Replace(head, "b.example", "b.example, capacity: {memory: 64}", 1) + tail, "4:46", `"64" has no unit`},
	{"wrong unit of memory", strings.Replace(head, "b.example", "b.example, capacity: {memory: 64GB}", 1) + tail, "4:46", "write 64GiB"},
	{"negative processes", strings.Replace(head, "b.example", "b.example, capacity: {processes: -1}", 1) + tail, "4:49", "-1 is negative"},

	{"evacuated host unknown", head + tail + "evacuate: [a, d]\n", "7:15", `"d" is none of hosts: a, b, c`},
	{"evacuated twice", head + tail + "evacuate: [a, a]\n", "7:15", "in the list already"},
	{"all evacuated", head + tail + "evacuate: [a, b, c]\n", "7:11", "none is left"},
	{"budget unit", head + tail + "budget: 1GB\n", "7:9", "write 1Gbit"},
	{"budget without unit", head + tail + "budget: 100\n", "7:9", "the unit is missing"},
	{"budget too small", head + tail + "budget: 1bit\n", "7:9", "less than 1Mbit"},
	{"negative limit", head + tail + "limits: {at_once: -1}\n", "7:19", "-1 is negative"},
	{"too many retries", head + tail + "retries: 1000\n", "7:10", "not between 0 and 100"},
	{"negative retries", group("retries: -1"), "9:14", "not between 0 and 100"},
	{"deadline without unit", head + tail + "deadline: 90\n", "7:11", `"90" has no unit; write 90s, 90m or 90h`},
	{"deadline in days", head + tail + "deadline: 2d\n", "7:11", "write 48h"},
	{"deadline in words", head + tail + "deadline: 5 minutes\n", "7:11", "write 5m"},
	{"deadline at once", head + tail + "deadline: 0s\n", "7:11", "leave the key out"},
	{"deadline of a list", head + tail + "deadline: [1h]\n", "7:11", "not a single value"},
	{"deadline in rubbish", head + tail + "deadline: soon\n", "7:11", "not a length of time"},
	{"on_failure", head + tail + "on_failure: abort\n", "7:13", "it is one of continue, stop, return"},
	{"window without to", head + tail + "window: {from: '22:00'}\n", "7:9", "window.to: is missing"},
	{"window of another form", head + tail + "window: {from: 10pm, to: '06:00'}\n", "7:16", "no time of day"},
	{"window until 24:00", head + tail + "window: {from: '22:00', to: '24:00'}\n", "7:29", "write 00:00"},
	{"window of nothing", head + tail + "window: {from: '22:00', to: '22:00'}\n", "7:29", "the same as from"},
	{"zone", head + tail + "window: {from: '22:00', to: '06:00', zone: Mars/Base}\n", "7:44", "not known"},

	{"no groups", head, "", "groups: is missing"},
	{"empty groups", head + "groups: []\n", "6:9", "groups: is missing"},
	{"no name", head + "groups:\n  - select: [{unit: x}]\n", "7:5", "groups[0].name: is missing"},
	{"same name", head + "groups:\n  - {name: g, select: [{unit: x}]}\n  - {name: g, select: [{unit: y}]}\n", "8:12", "the name of groups[0]"},
	{"no select", head + "groups: [{name: g}]\n", "6:10", "select: is missing"},
	{"everything", selecting("host: a"), "7:24", "selects everything"},
	{"empty selector", selecting(""), "7:24", "selects everything"},
	{"selector on an unknown host", selecting("host: d, unit: x"), "7:31", `"d" is none of hosts`},
	{"pid without host", selecting("pid: 12"), "7:30", "needs host"},
	{"negative pid", selecting("host: a, pid: -2"), "7:39", "-2 is not between"},
	{"pidfile without host", selecting("pidfile: /run/x.pid"), "7:34", "needs host"},
	{"pidfile not absolute", selecting("host: a, pidfile: x.pid"), "7:43", "not an absolute path"},
	{"pid and pidfile", selecting("host: a, pid: 1, pidfile: /x"), "7:51", "contradicts pid"},
	{"pattern", selecting("command: 'redis['"), "7:34", "is no pattern"},
	{"cgroup", selecting("cgroup: system.slice"), "7:33", "does not begin with /"},
	{"label", selecting("label: =x"), "7:32", "KEY=VALUE"},
	{"same selector", selecting("unit: x}, {unit: x"), "7:35", "the same as groups[0].select[0]"},
	{"to unknown", group("to: [b, d]"), "9:13", `"d" is none of hosts`},
	{"to twice", group("to: [b, b]"), "9:13", "in the list already"},
	{"to an evacuated host", group("to: [b, a]\nevacuate: [a]"), "9:13", "a is evacuated"},
	{"to where it is", head + "groups: [{name: g, select: [{host: a, unit: x}], to: [a]}]\n", "6:36", "cannot move"},
	{"after itself", group("after: [g]"), "9:13", "goes in a circle: g after g"},
	{"after an unknown group", group("after: [h]"), "9:13", `"h" is none of groups: g`},
	{"circle", head + "groups:\n  - {name: x, select: [{unit: x}], after: [y]}\n  - {name: y, select: [{unit: y}], after: [z]}\n  - {name: z, select: [{unit: z}], after: [x]}\n", "9:44", "x after y after z after x"},
	{"mode", group("mode: live"), "9:11", "it is one of auto, hybrid"},
	{"trap", group("trap: none"), "9:11", "it is one of auto, uffd, fuse"},
	{"transport", group("transport: quic"), "9:16", "it is one of auto, rdma, tcp"},
	{"tcp", group("tcp: keep"), "9:10", "it is one of refuse, close"},
	{"compress", group("compress: zstd"), "9:15", "it is one of auto, lz4, none"},
	{"shown", group("shown: yes"), "9:12", "it is one of drop, keep"},
	{"pidns", group("pidns: own"), "9:12", "it is one of auto, host, new"},
	{"on_source_exit", group("on_source_exit: nothing"), "9:21", "it is one of kill, exit0, stop-unit"},
	{"bandwidth", group("max_bandwidth: 10GB"), "9:20", "write 10Gbit"},
	{"downtime without unit", group("max_downtime: 50"), "9:19", `"50" has no unit`},
	{"downtime of post-copy", group("mode: postcopy\n    max_downtime: 50ms"), "10:19", "the mode is postcopy"},
	{"throttle", group("mode: precopy\n    throttle: 1"), "10:15", "no part of the time"},
	{"throttle that is no number", group("mode: precopy\n    throttle: .nan"), "10:15", "number"},
	{"throttle of hybrid", group("throttle: 0.5"), "9:15", "mode: precopy"},
	{"keep with uffd", group("trap: uffd\n    shown: keep"), "10:12", "leave one of the two out"},
	{"addresses", group("addresses: {10.0.0.1: here}"), "9:27", "no IP address"},
	{"old address", group("addresses: {there: 10.0.0.1}"), "9:24", "no IP address"},
	{"aliases that multiply", head + bomb(), "", "too much here"},
}

// bomb is a small file that stands for many selectors.
func bomb() string {
	s := "groups:\n  - &g\n    select:\n" + strings.Repeat("    - unit: b\n", 600)
	return s + strings.Repeat("  - *g\n", 600)
}

func TestBadFilesSayWhereAndWhat(t *testing.T) {
	if len(badFiles) < 60 {
		t.Fatalf("only %d bad files", len(badFiles))
	}
	for _, c := range badFiles {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f.yaml", []byte(c.text))
			if err == nil {
				t.Fatalf("accepted:\n%.500s", c.text)
			}
			msg := err.Error()
			at := "f.yaml:" + c.at + ": "
			if c.at == "" {
				at = "f.yaml: "
			}
			if c.name == "aliases that multiply" {
				at = "f.yaml:"
			}
			if !strings.HasPrefix(msg, at) || !strings.Contains(msg, c.want) || strings.Contains(msg, "\n") {
				t.Errorf("got  %s\nwant %s... %s", msg, at, c.want)
			}
		})
	}
}
