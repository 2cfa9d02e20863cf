package yamlfile

import (
	"fmt"
	"reflect"
	"strings"
)

// Key is the name of a struct's field in YAML, "" if it has none.
func Key(f reflect.StructField) string {
	key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	if key == "-" {
		return ""
	}
	return key
}

// Keys calls visit for every key that a file of type t can have, outermost first,
// with the field as FieldError names it but for indices, which are [], and for
// names, which are NAME.
func Keys(t reflect.Type, visit func(field string, f reflect.StructField)) {
	walkKeys(t, "", visit)
}

func walkKeys(t reflect.Type, at string, visit func(string, reflect.StructField)) {
	switch t.Kind() {
	case reflect.Pointer:
		walkKeys(t.Elem(), at, visit)
	case reflect.Slice:
		walkKeys(t.Elem(), at+"[]", visit)
	case reflect.Map:
		walkKeys(t.Elem(), at+".NAME", visit)
	case reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			if k := Key(f); k != "" {
				visit(join(at, k), f)
				walkKeys(f.Type, join(at, k), visit)
			}
		}
	}
}

func fieldOf(t reflect.Type, key string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if f := t.Field(i); key != "" && Key(f) == key {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

// unknown is the error for a key that section t does not have: it is misspelt, or
// belongs elsewhere in the file.
func unknown(key string, t, root reflect.Type) error {
	var own, all []string
	for i := range t.NumField() {
		if k := Key(t.Field(i)); k != "" {
			own = append(own, k)
		}
	}
	places := map[string]string{}
	Keys(root, func(field string, f reflect.StructField) {
		if k := Key(f); places[k] == "" {
			places[k] = field
			all = append(all, k)
		}
	})
	msg := fmt.Sprintf("unknown field %q", key)
	if near := nearest(key, own); near != "" {
		return fmt.Errorf("%s; did you mean %q?", msg, near)
	}
	if near := nearest(key, all); near != "" {
		return fmt.Errorf("%s; did you mean %q?", msg, places[near])
	}
	return fmt.Errorf("%s; there are %s here", msg, strings.Join(own, ", "))
}

// nearest is the candidate that differs from s by the fewest edits, "" when all
// differ by more than a third.
func nearest(s string, candidates []string) string {
	if len(s) > 64 {
		return ""
	}
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
