//go:build !cgo

package verbs

import "fmt"

func load() (binding, error) {
	return nil, fmt.Errorf("%w: this binary was built without cgo", ErrNoLibrary)
}
