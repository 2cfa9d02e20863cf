package schema

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/bulk"
	"github.com/pageferry/pageferry/internal/yamlfile"
)

func TestFresh(t *testing.T) {
	files, err := Files("../..")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 2 {
		t.Fatalf("%d schemas", len(files))
	}
	for name, want := range files {
		if have, err := os.ReadFile(name); err != nil || !bytes.Equal(have, want) {
			t.Errorf("configs/schema/%s is not what the types make (%v): run \"make schema\" (go generate ./configs/schema) and commit it", name, err)
		}
	}
}

// compiled is a committed schema, as other programs use it.
func compiled(t *testing.T, name string) *jsonschema.Schema {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource(name, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(name)
	if err != nil {
		t.Fatal(err)
	}
	if s.DraftVersion != 2020 {
		t.Errorf("%s is of draft %d", name, s.DraftVersion)
	}
	return s
}

// validate holds a YAML file against a schema.
func validate(t *testing.T, s *jsonschema.Schema, text []byte) error {
	t.Helper()
	var v any
	if err := yaml.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	plain, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(plain))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(doc)
}

func TestSamplesFitTheirSchema(t *testing.T) {
	daemon, many := compiled(t, "daemon.json"), compiled(t, "bulk.json")
	samples, err := filepath.Glob("../*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	count := map[bool]int{}
	for _, path := range samples {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		isBulk := strings.HasPrefix(filepath.Base(path), "bulk-")
		count[isBulk]++
		s, other := daemon, many
		if isBulk {
			s, other = many, daemon
		}
		if err := validate(t, s, text); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if validate(t, other, text) == nil {
			t.Errorf("%s fits the other file's schema as well", path)
		}
	}
	if count[true] < 6 || count[false] < 4 {
		t.Errorf("samples found: %v", samples)
	}
}

// What is wrong by itself is refused by schema and loader alike, and what is
// right accepted.
func TestSchemaAgreesWithTheLoader(t *testing.T) {
	const head = "tls: {ca: x, cert: y, key: z}\nhosts: {a: {address: a}, b: {address: b}}\n"
	with := func(keys string) string { return head + "groups: [{name: g, select: [{unit: x}]" + keys + "}]\n" }
	also := func(keys string) string { return with("") + keys }
	for text, ok := range map[string]bool{
		with(""): true, also("retries: 0"): true, also("deadline: 1h30m"): true, also("deadline: +.5s"): true, also("budget: none"): true,
		also("budget: 10gbit/s"): true, also("budget: 1.5 GiB"): true, with(", mode: auto, throttle: 0"): true, with(", max_downtime: 50ms"): true,
		also("limits: {at_once: 0, per_host: 3}"): true, also("window: {from: 22:00, to: '06:00'}"): true, with(", optional: true"): true,
		strings.Replace(with(""), "address: b", "address: b, capacity: {memory: 1.5GiB, processes: 3}", 1): true,
		strings.Replace(with(""), "address: b", "address: b, capacity: {memory: 0}", 1):                    true,
		strings.Replace(with(""), "unit: x", "user: 1000", 1):                                              true,

		head: false, with(", mod: stop"): false, with(", mode: live"): false, also("retries: -1"): false, also("retries: 101"): false, also("retries: two"): false,
		also("deadline: 90"): false, also("deadline: 2d"): false, also("deadline: soon"): false, also("budget: 10"): false, also("budget: 10GB"): false,
		also("limits: {at_once: -1}"): false, also("limits: 3"): false, also("evacuate: a"): false, also("on_failure: abort"): false,
		also("window: {from: 22:00}"): false, also("window: {from: 10pm, to: '06:00'}"): false, also("name: a/b"): false, with(", throttle: 1"): false,
		with(", throttle: -0.5"): false, with(", optional: 1"): false, with(", to: b"): false, with(", after: {a: b}"): false,
		strings.Replace(with(""), "unit: x", "pid: -1", 1):                                 false,
		strings.Replace(with(""), "unit: x", "host: a, pidfile: x", 1):                     false,
		strings.Replace(with(""), "unit: x", "cgroup: x", 1):                               false,
		strings.Replace(with(""), "address: b", "address: b, capacity: {memory: 64GB}", 1): false,
		strings.Replace(with(""), "address: b", "address: b, capacity: {memory: 64}", 1):   false,
		strings.Replace(with(""), "address: b", "api: b", 1):                               false,
		strings.Replace(with(""), ", b: {address: b}", "", 1):                              false,
		strings.Replace(with(""), "key: z", "kee: z", 1):                                   false,
		strings.Replace(with(""), "[{unit: x}]", "[]", 1):                                  false,
	} {
		_, loader := bulk.Parse("f.yaml", []byte(text))
		schema := validate(t, compiled(t, "bulk.json"), []byte(text))
		if (loader == nil) != ok || (schema == nil) != ok {
			t.Errorf("%s\nis right: %v\nloader: %v\nschema: %v", text, ok, loader, schema)
		}
	}
}

// Each word of a tag is one that Validate takes, and no other.
func TestWordsOfTheDaemon(t *testing.T) {
	words := 0
	yamlfile.Keys(reflect.TypeFor[appliance.Config](), func(field string, f reflect.StructField) {
		allowed := strings.Fields(f.Tag.Get("oneof"))
		for _, w := range append(allowed, "neither") {
			text := "insecure: true\n"
			if section, key, ok := strings.Cut(field, "."); ok {
				text += section + ": {" + key + ": " + w + "}\n"
			} else {
				text += field + ": " + w + "\n"
			}
			if len(allowed) == 0 || field == "page_lanes" && w == "tls" {
				continue
			}
			words++
			_, loader := appliance.ParseConfig("f.yaml", []byte(text))
			schema := validate(t, compiled(t, "daemon.json"), []byte(text))
			if ok := w != "neither"; (loader == nil) != ok || (schema == nil) != ok {
				t.Errorf("%s\nis right: %v\nloader: %v\nschema: %v", text, ok, loader, schema)
			}
		}
	})
	if words < 30 {
		t.Errorf("only %d words seen", words)
	}
}

// Every key is explained to operators: of bulk migrations in a table, of the daemon
// in the sample that has all.
func TestEveryKeyIsDocumented(t *testing.T) {
	for _, c := range []struct {
		path, form string
		of         reflect.Type
	}{
		{"../../docs/bulk.md", "| `KEY` |", reflect.TypeFor[bulk.File]()},
		{"../full.yaml", "KEY:", reflect.TypeFor[appliance.Config]()},
	} {
		text, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		yamlfile.Keys(c.of, func(field string, f reflect.StructField) {
			if want := strings.Replace(c.form, "KEY", yamlfile.Key(f), 1); !strings.Contains(string(text), want) {
				t.Errorf("%s has no %q for %s", c.path, want, field)
			}
		})
	}
}
