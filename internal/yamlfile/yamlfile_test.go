package yamlfile

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

type inner struct {
	Word  string `yaml:"word" oneof:"red green"`
	Count int    `yaml:"count,omitempty" min:"1" max:"9"`
}

type outer struct {
	Name   string           `yaml:"name"`
	Part   inner            `yaml:"part"`
	More   *inner           `yaml:"more"`
	List   []inner          `yaml:"list"`
	Named  map[string]inner `yaml:"named"`
	Number *int             `yaml:"number" min:"2"`
	Free   float64          `yaml:"free"`
	Inside string           // not in files

}

func (o *outer) Validate() error {
	if o.Name == "plain" {
		return errors.New("is plain")
	}
	if o.Name != "" {
		return &FieldError{Field: o.Name, Msg: "is meant"}
	}
	return CheckTags(o)
}

// A file that names a field gets the error there, or at the section around it.
func TestFieldsAreFound(t *testing.T) {
	const text = "part:\n  word: red\nlist:\n  - {word: red}\n  - count: 3\nnamed:\n  a.b: {word: red}\n  c:\n    word: green\nname: "
	for field, want := range map[string]string{
		"part":             "1:1",
		"part.word":        "2:9",
		"part.count":       "1:1",
		"list":             "4:3",
		"list[0]":          "4:5",
		"list[0].word":     "4:12",
		"list[1]":          "5:5",
		"list[1].count":    "5:12",
		"list[1].word":     "5:5",
		"list[7].word":     "4:3",
		"named.a.b.word":   "7:15",
		"named.a.b.count":  "7:8",
		"named.c":          "8:3",
		"named.c.word":     "9:11",
		"named.missing.at": "6:1",
		"missing":          "",
	} {
		_, err := Decode[outer]("f", []byte(text+"\""+field+"\"\n"))
		want = strings.TrimSuffix("f:"+want, ":") + ": " + field + ": is meant"
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		var e *Error
		var fe *FieldError
		if !errors.As(err, &e) || !errors.As(err, &fe) || fe.Field != field {
			t.Errorf("%v is %T", err, err)
		}
	}
	if _, err := Decode[outer]("f", []byte("name: plain\n")); err == nil || err.Error() != "f: is plain" {
		t.Errorf("an error without a field: %v", err)
	}
}

func TestTags(t *testing.T) {
	one := 1
	for _, c := range []struct {
		v    outer
		want string
	}{
		{outer{}, ""},
		{outer{Part: inner{"red", 9}, More: &inner{"green", 1}}, ""},
		{outer{Part: inner{"blue", 0}}, `part.word: "blue" is not known; it is one of red, green`},
		{outer{Part: inner{"", 10}}, "part.count: 10 is not between 1 and 9"},
		{outer{More: &inner{"", -1}}, "more.count: -1 is not between 1 and 9"},
		{outer{List: []inner{{}, {Word: "x"}}}, `list[1].word: "x" is not known`},
		{outer{Named: map[string]inner{"b": {Count: 20}, "a": {Count: 30}}}, "named.a.count: 30"},
		{outer{Number: &one}, "number: 1 is less than 2"},
	} {
		err := CheckTags(&c.v)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

func TestKeys(t *testing.T) {
	var got []string
	Keys(reflect.TypeFor[outer](), func(field string, f reflect.StructField) { got = append(got, field) })
	want := strings.Fields("name part part.word part.count more more.word more.count list list[].word list[].count named named.NAME.word named.NAME.count number free")
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.yaml")
	if _, err := Load[outer](path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, []byte("part: {word: blue}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load[outer](path); err == nil || !strings.HasPrefix(err.Error(), path+":1:14: part.word: ") {
		t.Errorf("a wrong word: %v", err)
	}
	if err := os.WriteFile(path, []byte("number: 3\nfree: 1\nlist:\nnamed: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if o, err := Load[outer](path); err != nil || o.Number == nil || *o.Number != 3 || o.Free != 1 {
		t.Errorf("a right file: %+v, %v", o, err)
	}
	if _, err := Decode[outer]("f", []byte("Inside: x\n")); err == nil || !strings.Contains(err.Error(), `unknown field "Inside"`) {
		t.Errorf("a field without a key: %v", err)
	}
}

func TestNearest(t *testing.T) {
	keys := []string{"at_once", "per_host", "mode"}
	for s, want := range map[string]string{"at-once": "at_once", "MODE": "mode", "perhost": "per_host", "zebra": "", strings.Repeat("x", 1000): ""} {
		if got := nearest(s, keys); got != want {
			t.Errorf("nearest to %.20q is %q, want %q", s, got, want)
		}
	}
}
