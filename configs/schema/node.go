package schema

import (
	"encoding/json"
	"fmt"
	"path"
	"reflect"
	"strconv"
	"strings"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/bulk"
	"github.com/pageferry/pageferry/internal/yamlfile"
)

// node is a schema, or a part of one.
type node struct {
	Dialect     string      `json:"$schema,omitempty"`
	Title       string      `json:"title,omitempty"`
	Description string      `json:"description,omitempty"`
	Type        any         `json:"type,omitempty"` // a name, or several
	Enum        []string    `json:"enum,omitempty"`
	Pattern     string      `json:"pattern,omitempty"`
	MaxLength   int         `json:"maxLength,omitempty"`
	Minimum     *int        `json:"minimum,omitempty"`
	Maximum     *int        `json:"maximum,omitempty"`
	Below       *int        `json:"exclusiveMaximum,omitempty"`
	Items       *node       `json:"items,omitempty"`
	MinItems    int         `json:"minItems,omitempty"`
	Properties  *properties `json:"properties,omitempty"`
	Required    []string    `json:"required,omitempty"`
	MinNames    int         `json:"minProperties,omitempty"`
	Names       any         `json:"additionalProperties,omitempty"` // false, or a node
}

// properties keep the order of the fields, which people wrote for people.
type properties struct {
	keys  []string
	nodes []*node
}

// MarshalJSON implements json.Marshaler.
func (p *properties) MarshalJSON() ([]byte, error) {
	var parts []string
	for i, k := range p.keys {
		text, err := json.Marshal(p.nodes[i])
		if err != nil {
			return nil, err
		}
		parts = append(parts, strconv.Quote(k)+":"+string(text))
	}
	return []byte("{" + strings.Join(parts, ",") + "}"), nil
}

// Values in text, as the parsers of appliance and bulk read them.
const (
	sizePattern      = `^\s*(0|[0-9]+(\.[0-9]+)?\s*(B|KiB|MiB|GiB|TiB))\s*$`
	durationPattern  = `^\+?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$`
	bandwidthPattern = `^(none|\s*[0-9]+(\.[0-9]+)?\s*([KkMmGgTt]?[Bb][Ii][Tt]|[KkMmGgTt][Ii][Bb]|B)\s*(/s)?\s*)$`
	clockPattern     = `^([01][0-9]|2[0-3]):[0-5][0-9]$`
	namePattern      = `^[A-Za-z0-9][A-Za-z0-9._-]*$`
)

// of is the schema of values of type t.
func (d docs) of(t reflect.Type) (*node, error) {
	switch t {
	case reflect.TypeFor[appliance.Size]():
		zero := 0 // which needs no unit, and is then a number
		return &node{Type: []string{"string", "integer"}, Pattern: sizePattern, Minimum: &zero, Maximum: &zero}, nil
	case reflect.TypeFor[bulk.Duration]():
		return &node{Type: "string", Pattern: durationPattern}, nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.of(t.Elem())
	case reflect.String:
		return &node{Type: "string"}, nil
	case reflect.Int:
		return &node{Type: "integer"}, nil
	case reflect.Float64:
		return &node{Type: "number"}, nil
	case reflect.Bool:
		return &node{Type: "boolean"}, nil
	case reflect.Slice:
		items, err := d.of(t.Elem())
		return &node{Type: "array", Items: items}, err
	case reflect.Map:
		values, err := d.of(t.Elem())
		return &node{Type: "object", Names: values}, err
	case reflect.Struct:
		return d.section(t)
	}
	return nil, fmt.Errorf("schema: nothing is known of type %s", t)
}

func (d docs) section(t reflect.Type) (*node, error) {
	n := &node{Type: "object", Properties: &properties{}, Names: false}
	for i := range t.NumField() {
		f := t.Field(i)
		key := yamlfile.Key(f)
		if key == "" {
			continue
		}
		p, err := d.of(f.Type)
		if err != nil {
			return nil, err
		}
		if err := p.limit(f.Tag); err != nil {
			return nil, fmt.Errorf("%w, at %s.%s", err, t, f.Name)
		}
		p.Description = d[path.Base(t.PkgPath())+"."+t.Name()+"."+f.Name]
		if rest, ok := strings.CutPrefix(p.Description, f.Name+" "); ok {
			p.Description = key + " " + rest // a comment begins with the name in Go
		}
		if p.Description == "" {
			return nil, fmt.Errorf("schema: %s.%s has no comment, so the key %s no description", t, f.Name, key)
		}
		if f.Tag.Get("need") != "" {
			n.Required = append(n.Required, key)
		}
		n.Properties.keys = append(n.Properties.keys, key)
		n.Properties.nodes = append(n.Properties.nodes, p)
	}
	return n, nil
}

// limit adds what a field's tags say.
func (n *node) limit(tag reflect.StructTag) error {
	n.Enum = strings.Fields(tag.Get("oneof"))
	for _, b := range []struct {
		name string
		to   **int
	}{{"min", &n.Minimum}, {"max", &n.Maximum}} {
		if text := tag.Get(b.name); text != "" {
			v, err := strconv.Atoi(text)
			if err != nil {
				return fmt.Errorf("schema: tag %s: %w", b.name, err)
			}
			*b.to = &v
		}
	}
	if n.Minimum != nil && n.Type == "integer" {
		zero := 0 // is unset, whatever the least is
		n.Minimum = &zero
	}
	if need, err := strconv.Atoi(tag.Get("need")); err == nil {
		switch n.Type {
		case "array":
			n.MinItems = need
		case "object":
			if n.Properties == nil {
				n.MinNames = need
			}
		}
	}
	switch form := tag.Get("form"); form {
	case "":
	case "bandwidth":
		n.Pattern = bandwidthPattern
	case "clock":
		n.Pattern = clockPattern
	case "name":
		n.Pattern, n.MaxLength = namePattern, 64
	case "path":
		n.Pattern = "^/"
	case "user":
		n.Type = []string{"string", "integer"}
	case "part":
		zero, one := 0, 1
		n.Minimum, n.Below = &zero, &one
	default:
		return fmt.Errorf("schema: the form %q is not known", form)
	}
	return nil
}
