package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxConfigBytes bounds what is read as a configuration.
const maxConfigBytes = 1 << 20

// LoadConfig reads the file at path. Its error begins with file:line:column
// where the file is at fault, and says what was meant where that can be told.
func LoadConfig(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	if len(data) > maxConfigBytes {
		return Config{}, fmt.Errorf("%s: larger than %d bytes, which no configuration is", path, maxConfigBytes)
	}
	return ParseConfig(path, data)
}

// ParseConfig is LoadConfig for bytes at hand; name stands in errors.
func ParseConfig(name string, data []byte) (Config, error) {
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, locate(name, err)
	}
	if err := c.Validate(); err != nil {
		var fe *FieldError
		if errors.As(err, &fe) {
			if tk := fieldToken(data, fe.Field); tk != nil {
				return Config{}, at(name, tk, fe.Error())
			}
		}
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

func at(name string, tk *token.Token, msg string) error {
	if tk == nil || tk.Position == nil {
		return fmt.Errorf("%s: %s", name, msg)
	}
	return fmt.Errorf("%s:%d:%d: %s", name, tk.Position.Line, tk.Position.Column, msg)
}

func locate(name string, err error) error {
	var se *sizeError
	if errors.As(err, &se) {
		return at(name, se.token, se.Error())
	}
	var ye yaml.Error
	if !errors.As(err, &ye) {
		return fmt.Errorf("%s: %w", name, err)
	}
	msg, tk := ye.GetMessage(), ye.GetToken()
	var unknown *yaml.UnknownFieldError
	if errors.As(err, &unknown) && tk != nil {
		if near := nearest(tk.Value, configKeys()); near != "" {
			msg += fmt.Sprintf("; did you mean %q?", near)
		}
	}
	return at(name, tk, msg)
}

// fieldToken finds where a field of Validate's error stands in the file, or the
// nearest section around it.
func fieldToken(data []byte, field string) *token.Token {
	f, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil
	}
	for field != "" {
		if p, err := yaml.PathString("$." + field); err == nil {
			if node, err := p.FilterFile(f); err == nil && node != nil {
				return node.GetToken()
			}
		}
		i := strings.LastIndexByte(field, '.')
		if i < 0 {
			return nil
		}
		field = field[:i]
	}
	return nil
}

// configKeys are all keys that a configuration can have, at any depth.
func configKeys() []string {
	var keys []string
	var walk func(t reflect.Type)
	walk = func(t reflect.Type) {
		if t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct {
			return
		}
		for i := range t.NumField() {
			if k := t.Field(i).Tag.Get("yaml"); k != "" {
				keys = append(keys, k)
				walk(t.Field(i).Type)
			}
		}
	}
	walk(reflect.TypeFor[Config]())
	return keys
}

// nearest is the candidate that differs from s by the fewest edits, "" when all
// differ by more than a third.
func nearest(s string, candidates []string) string {
	best, at := "", max(1, len(s)/3)+1
	for _, c := range candidates {
		if d := edits(strings.ReplaceAll(strings.ToLower(s), "-", "_"), c); d < at {
			best, at = c, d
		}
	}
	return best
}

// edits is the Levenshtein distance of two short strings.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

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

type sizeError struct {
	token *token.Token
	err   error
}

func (e *sizeError) Error() string { return e.err.Error() }
func (e *sizeError) Unwrap() error { return e.err }

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (s *Size) UnmarshalYAML(node ast.Node) error {
	tk := node.GetToken()
	if tk == nil {
		return errors.New("a size is missing")
	}
	v, err := ParseSize(tk.Value)
	if err != nil {
		return &sizeError{token: tk, err: err}
	}
	*s = v
	return nil
}
