package checkpoint

import (
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }
