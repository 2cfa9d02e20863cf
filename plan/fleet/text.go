package fleet

import "fmt"

func size(bytes uint64) string {
	switch b := float64(bytes); {
	case bytes >= 10<<30:
		return fmt.Sprintf("%.0f GiB", b/(1<<30))
	case bytes >= 1<<30:
		return fmt.Sprintf("%.1f GiB", b/(1<<30))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.0f MiB", b/(1<<20))
	case bytes >= 1<<10:
		return fmt.Sprintf("%.0f KiB", b/(1<<10))
	default:
		return fmt.Sprintf("%d bytes", bytes)
	}
}
