package rdma

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

// TestNoSoftRoCE: on a kernel without it, the error says which module is missing.
func TestNoSoftRoCE(t *testing.T) {
	testutil.Require(t, testutil.Root)
	if rxeLoaded() {
		return // what happens then is what testSoft checks
	}
	if _, err := os.Stat("/lib/modules"); err == nil {
		return // a test loads no modules into the machine's own kernel
	}
	s, err := MakeSoft(t.Context(), "lo")
	if err == nil {
		_ = s.Close()
	}
	if !errors.Is(err, ErrNoSoftRoCE) || !strings.Contains(err.Error(), "rdma_rxe") {
		t.Errorf("%v", err)
	}
}
