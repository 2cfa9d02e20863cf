package yamlfile

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// CheckTags compares every field of a struct, and of what is in it, with its tags
// oneof, min and max; unset fields pass. Its error is a *FieldError.
func CheckTags(v any) error {
	return checkTags(reflect.ValueOf(v), "")
}

func checkTags(v reflect.Value, at string) error {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return checkTags(v.Elem(), at)
	case reflect.Slice:
		for i := range v.Len() {
			if err := checkTags(v.Index(i), fmt.Sprintf("%s[%d]", at, i)); err != nil {
				return err
			}
		}
	case reflect.Map:
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return cmp.Compare(a.String(), b.String()) })
		for _, k := range keys {
			if err := checkTags(v.MapIndex(k), join(at, k.String())); err != nil {
				return err
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			key := Key(f)
			if key == "" {
				continue
			}
			if msg := outside(v.Field(i), f.Tag); msg != "" {
				return &FieldError{Field: join(at, key), Msg: msg}
			}
			if err := checkTags(v.Field(i), join(at, key)); err != nil {
				return err
			}
		}
	}
	return nil
}

// outside returns "", or why a field's value is not among those of its tags.
func outside(v reflect.Value, tag reflect.StructTag) string {
	if v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	switch v.Kind() {
	case reflect.String:
		allowed := strings.Fields(tag.Get("oneof"))
		if s := v.String(); s != "" && len(allowed) > 0 && !slices.Contains(allowed, s) {
			return fmt.Sprintf("%q is not known; it is one of %s", s, strings.Join(allowed, ", "))
		}
	case reflect.Int:
		n := v.Int()
		low, hasLow := bound(tag, "min")
		high, hasHigh := bound(tag, "max")
		switch {
		case n == 0:
		case hasLow && hasHigh && (n < low || n > high):
			return fmt.Sprintf("%d is not between %d and %d", n, low, high)
		case hasLow && low <= 1 && n < 0:
			return fmt.Sprintf("%d is negative", n)
		case hasLow && n < low:
			return fmt.Sprintf("%d is less than %d", n, low)
		case hasHigh && n > high:
			return fmt.Sprintf("%d is more than %d", n, high)
		}
	}
	return ""
}

func bound(tag reflect.StructTag, name string) (int64, bool) {
	n, err := strconv.ParseInt(tag.Get(name), 10, 64)
	return n, err == nil
}
