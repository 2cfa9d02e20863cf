package yamlfile

import (
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// maxNodes bounds what aliases can make of a small file.
const maxNodes = 1 << 18

// placed is an error and where it is.
type placed struct {
	token *token.Token
	err   error
}

// checker compares a file with a type before it is decoded: the decoder's own
// errors speak of Go, and not all of them have a place.
type checker struct {
	root    reflect.Type
	anchors map[string]ast.Node
	places  map[string]*token.Token // by field
	left    int                     // nodes that may still be looked at
}

func (c *checker) file(body ast.Node, v any) *placed {
	c.root, c.anchors = reflect.TypeOf(v).Elem(), map[string]ast.Node{}
	ast.Walk(anchorFinder(c.anchors), body)
	return c.value(body, c.root, "", nil)
}

type anchorFinder map[string]ast.Node

// Visit implements ast.Visitor.
func (a anchorFinder) Visit(n ast.Node) ast.Visitor {
	if n, ok := n.(*ast.AnchorNode); ok {
		a[n.Name.GetToken().Value] = n.Value
	}
	return a
}

// place is where a field, or the nearest section around it, stands in the file;
// nil if nowhere.
func (c *checker) place(field string) *token.Token {
	for field != "" {
		if tk := c.places[field]; tk != nil {
			return tk
		}
		field = field[:max(0, strings.LastIndexAny(field, ".["))]
	}
	return nil
}

// resolve follows anchors, aliases and tags to what they stand for.
func (c *checker) resolve(n ast.Node) (ast.Node, *placed) {
	for range maxDepth {
		switch x := n.(type) {
		case *ast.AnchorNode:
			n = x.Value
		case *ast.TagNode:
			return nil, &placed{x.GetToken(), fmt.Errorf("the tag %s is not wanted; leave it out", x.GetToken().Value)}
		case *ast.AliasNode:
			name := x.Value.GetToken().Value
			target, ok := c.anchors[name]
			if !ok {
				return nil, &placed{x.GetToken(), fmt.Errorf("nothing is marked &%s", name)}
			}
			n = target
		default:
			return n, nil
		}
	}
	return nil, &placed{n.GetToken(), errors.New("refers to itself")}
}

// value checks one node against t. key is where it is named, nil in lists.
func (c *checker) value(n ast.Node, t reflect.Type, field string, key *token.Token) *placed {
	if c.left--; c.left < 0 {
		return &placed{n.GetToken(), errors.New("too much here; aliases repeat it too often")}
	}
	n, bad := c.resolve(n)
	if bad != nil {
		return bad
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	at := n.GetToken()
	if m, ok := n.(*ast.MappingNode); ok && !m.IsFlowStyle {
		at = key // a block has no character of its own
		if at == nil && len(m.Values) > 0 {
			at = m.Values[0].Key.GetToken()
		}
	}
	if field != "" {
		c.places[field] = at
	}
	wrong := func(want string) *placed {
		return &placed{at, fmt.Errorf("%s%s is not %s", prefix(field), what(n), want)}
	}
	if _, null := n.(*ast.NullNode); null {
		switch {
		case t.Kind() == reflect.Struct || t.Kind() == reflect.Map || t.Kind() == reflect.Slice:
			return nil // a section of which nothing is left but comments
		case key != nil:
			at = key
		}
		return &placed{at, fmt.Errorf("%shas no value; write one, or leave the key out", prefix(field))}
	}
	if u, ok := reflect.New(t).Interface().(yaml.NodeUnmarshaler); ok {
		if _, ok := n.(ast.ScalarNode); !ok {
			return wrong("a single value")
		}
		if err := u.UnmarshalYAML(n); err != nil {
			return &placed{at, err}
		}
		return nil
	}
	switch t.Kind() {
	case reflect.Struct:
		if m, ok := n.(*ast.MappingNode); ok {
			return c.section(m, t, field)
		}
		return wrong("a section; write keys with their values")
	case reflect.Map:
		if m, ok := n.(*ast.MappingNode); ok {
			return c.named(m, t, field)
		}
		return wrong("a list of names with values; write NAME: ...")
	case reflect.Slice:
		if s, ok := n.(*ast.SequenceNode); ok {
			for i, item := range s.Values {
				if bad := c.value(item, t.Elem(), fmt.Sprintf("%s[%d]", field, i), nil); bad != nil {
					return bad
				}
			}
			return nil
		}
		return wrong("a list; write [" + what(n) + "], or lines that begin with -")
	}
	if want := scalar(n, t); want != "" {
		return wrong(want)
	}
	return nil
}

// section checks a mapping that stands for a struct.
func (c *checker) section(m *ast.MappingNode, t reflect.Type, field string) *placed {
	for _, v := range m.Values {
		if v.Key.IsMergeKey() {
			if bad := c.merged(v.Value, t, field); bad != nil {
				return bad
			}
		}
	}
	for _, v := range m.Values {
		if v.Key.IsMergeKey() {
			continue
		}
		key := keyToken(v.Key)
		f, ok := fieldOf(t, key.Value)
		if !ok {
			return &placed{key, unknown(key.Value, t, c.root)}
		}
		if bad := c.value(v.Value, f.Type, join(field, key.Value), key); bad != nil {
			return bad
		}
	}
	return nil
}

// merged checks what << brings.
func (c *checker) merged(n ast.Node, t reflect.Type, field string) *placed {
	if c.left--; c.left < 0 {
		return &placed{n.GetToken(), errors.New("too much here; aliases repeat it too often")}
	}
	n, bad := c.resolve(n)
	if bad != nil {
		return bad
	}
	if m, ok := n.(*ast.MappingNode); ok {
		return c.section(m, t, field)
	}
	return &placed{n.GetToken(), fmt.Errorf("%s is no section that << could bring here", what(n))}
}

// named checks a mapping whose keys are names.
func (c *checker) named(m *ast.MappingNode, t reflect.Type, field string) *placed {
	for _, v := range m.Values {
		key := keyToken(v.Key)
		if v.Key.IsMergeKey() {
			return &placed{key, fmt.Errorf("%s<< is not for names; write them here", prefix(field))}
		}
		if bad := c.value(v.Value, t.Elem(), join(field, key.Value), key); bad != nil {
			return bad
		}
	}
	return nil
}

// scalar returns "", or what a value of type t is.
func scalar(n ast.Node, t reflect.Type) string {
	switch x := n.(type) {
	case *ast.StringNode, *ast.LiteralNode:
		if t.Kind() == reflect.String {
			return ""
		}
	case *ast.IntegerNode:
		switch {
		case t.Kind() == reflect.Int || t.Kind() == reflect.Float64:
			return ""
		case t.Kind() == reflect.String && fmt.Sprint(x.Value) == x.Token.Value:
			return ""
		}
	case *ast.FloatNode:
		if t.Kind() == reflect.Float64 || t.Kind() == reflect.String && fmt.Sprint(x.Value) == x.Token.Value {
			return ""
		}
	case *ast.BoolNode:
		if t.Kind() == reflect.Bool {
			return ""
		}
	}
	switch t.Kind() {
	case reflect.Int:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	case reflect.Bool:
		return "true or false"
	}
	if _, ok := n.(ast.ScalarNode); ok {
		return "text; put it into quotes: " + strconv.Quote(n.GetToken().Value)
	}
	return "text"
}

// what is a node for people.
func what(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode:
		return "a section of keys"
	case *ast.SequenceNode:
		return "a list"
	case *ast.NullNode:
		return "nothing"
	case *ast.StringNode, *ast.LiteralNode:
		return strconv.Quote(n.GetToken().Value)
	}
	return n.GetToken().Value
}

func prefix(field string) string {
	if field == "" {
		return ""
	}
	return field + ": "
}

func join(field, key string) string {
	if field == "" {
		return key
	}
	return field + "." + key
}

// keyToken is the name itself, past anchors and question marks.
func keyToken(n ast.Node) *token.Token {
	for range maxDepth {
		switch x := n.(type) {
		case *ast.MappingKeyNode:
			n = x.Value
		case *ast.AnchorNode:
			n = x.Value
		default:
			return n.GetToken()
		}
	}
	return n.GetToken()
}
