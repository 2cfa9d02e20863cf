package bench

import (
	"cmp"
	"slices"
	"time"
)

// Median is the middle of v, of an even number the mean of both; the zero value
// where v is empty.
func Median[T ~int64 | ~float64](v []T) T {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// Quantile is the smallest of v that at least the fraction q of them do not
// exceed.
func Quantile[T cmp.Ordered](v []T, q float64) T {
	var zero T
	if len(v) == 0 {
		return zero
	}
	s := slices.Sorted(slices.Values(v))
	i := int(q*float64(len(s)) + 0.999999)
	return s[min(max(i-1, 0), len(s)-1)]
}

// Mean of v, 0 where it is empty.
func Mean[T ~int64 | ~float64](v []T) float64 {
	if len(v) == 0 {
		return 0
	}
	var sum float64
	for _, x := range v {
		sum += float64(x)
	}
	return sum / float64(len(v))
}

// MS is d in milliseconds.
func MS(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// US is d in microseconds.
func US(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// GiB is 2^30 bytes.
const GiB = 1 << 30

// Rate is bytes per time in GiB/s.
func Rate(bytes float64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return bytes / GiB / d.Seconds()
}
