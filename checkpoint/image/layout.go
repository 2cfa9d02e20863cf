package image

import (
	"fmt"
)

var layoutMagic = [8]byte{'p', 'f', 'l', 'a', 'y', 'o', 'u', 't'}

// EncodeLayout is the form in which mappings travel before the image does.
func EncodeLayout(vmas []VMA) ([]byte, error) {
	body, err := encMode.Marshal(vmas)
	if err != nil {
		return nil, fmt.Errorf("image: layout: %w", err)
	}
	return Seal(layoutMagic, body), nil
}

// DecodeLayout reads it. Input may be hostile: what it returns is in ascending
// order, whole pages, and does not overlap.
func DecodeLayout(b []byte) ([]VMA, error) {
	body, err := Unseal(layoutMagic, b)
	if err != nil {
		return nil, fmt.Errorf("layout: %w", err)
	}
	var vmas []VMA
	if err := decMode.Unmarshal(body, &vmas); err != nil {
		return nil, fmt.Errorf("layout: %w: %v", ErrFormat, err)
	}
	for i := range vmas {
		v := &vmas[i]
		if v.Empty() || !v.Aligned() || i > 0 && v.Start < vmas[i-1].End {
			return nil, fmt.Errorf("layout: %w: mapping %v", ErrFormat, v.Range)
		}
	}
	return vmas, nil
}
