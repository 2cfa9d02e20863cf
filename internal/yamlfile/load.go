package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxBytes bounds what is read as a configuration.
const maxBytes = 1 << 20

// FieldError is a value that cannot be used.
type FieldError struct {
	Field string // as in YAML: "limits.incoming", "groups[2].after"; "" for the file
	Msg   string
}

func (e *FieldError) Error() string {
	if e.Field == "" {
		return e.Msg
	}
	return e.Field + ": " + e.Msg
}

// Error is what is wrong with a file, and where. Line and Column count from 1;
// they are 0 where no place is at fault, as when a key is missing.
type Error struct {
	File         string
	Line, Column int
	Err          error
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %v", e.File, e.Err)
	}
	return fmt.Sprintf("%s:%d:%d: %v", e.File, e.Line, e.Column, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Validator is what a file is decoded into: a pointer to T that can tell what is
// wrong. Validate's error is a *FieldError where a field is at fault.
type Validator[T any] interface {
	*T
	Validate() error
}

// Load reads and validates the file at path.
func Load[T any, P Validator[T]](path string) (T, error) {
	var none T
	f, err := os.Open(path)
	if err != nil {
		return none, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBytes+1))
	if err != nil {
		return none, fmt.Errorf("configuration: %w", err)
	}
	return Decode[T, P](path, data)
}

// Decode is Load for bytes at hand; name stands in errors, each of which is an
// *Error.
func Decode[T any, P Validator[T]](name string, data []byte) (v T, err error) {
	var none T
	fail := func(tk *token.Token, err error) (T, error) {
		e := &Error{File: name, Err: err}
		if tk != nil && tk.Position != nil {
			e.Line, e.Column = tk.Position.Line, tk.Position.Column
		}
		return none, e
	}
	// The parser is not ours, and a file must not end a daemon.
	defer func() {
		if r := recover(); r != nil {
			v, err = fail(nil, fmt.Errorf("cannot be read as YAML: %v", r))
		}
	}()
	if len(data) > maxBytes {
		return fail(nil, fmt.Errorf("larger than %d bytes, which no configuration is", maxBytes))
	}
	if tk := tooDeep(data); tk != nil {
		return fail(tk, fmt.Errorf("nested deeper than %d levels, which no configuration is", maxDepth))
	}
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return fail(place(err))
	}
	c := checker{places: map[string]*token.Token{}, left: maxNodes}
	if body, err := onlyDocument(file); err != nil {
		return fail(err.token, err.err)
	} else if body != nil {
		if err := c.file(body, &v); err != nil {
			return fail(err.token, err.err)
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(&v); err != nil && !errors.Is(err, io.EOF) {
		return fail(place(err))
	}
	if err := P(&v).Validate(); err != nil {
		var fe *FieldError
		if errors.As(err, &fe) {
			return fail(c.place(fe.Field), err)
		}
		return fail(nil, err)
	}
	return v, nil
}

// onlyDocument returns the body of the one document of a file, nil if it is empty.
func onlyDocument(f *ast.File) (ast.Node, *placed) {
	var body ast.Node
	for _, d := range f.Docs {
		switch {
		case d.Body == nil || d.Body.Type() == ast.CommentType:
		case body != nil:
			return nil, &placed{d.Body.GetToken(), errors.New("a second document begins here, which nobody would read; make it a file of its own")}
		default:
			body = d.Body
		}
	}
	return body, nil
}

// place takes an error of the YAML package apart.
func place(err error) (*token.Token, error) {
	var ye yaml.Error
	if !errors.As(err, &ye) {
		return nil, errors.New(firstLine(err.Error()))
	}
	return ye.GetToken(), errors.New(firstLine(ye.GetMessage()))
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
