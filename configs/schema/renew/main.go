// Renew writes daemon.json and bulk.json anew; "go generate ./configs/schema" runs
// it, in the folder above.
package main

import (
	"fmt"
	"os"

	"github.com/pageferry/pageferry/configs/schema"
)

func main() {
	files, err := schema.Files("../..")
	for name, text := range files {
		if err == nil {
			err = os.WriteFile(name, text, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "renew:", err)
		os.Exit(1)
	}
}
