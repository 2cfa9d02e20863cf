package appliance

import (
	"errors"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/dirty"
)

// The doctor names the method that is used, and why no better one is.
func TestDoctorTracking(t *testing.T) {
	no := errors.New("not here")
	for _, c := range []struct {
		tried   []dirty.Support
		verdict Verdict
		found   string
	}{
		{[]dirty.Support{{Method: dirty.WPAsync}, {Method: dirty.SoftDirty, Err: no}, {Method: dirty.Hash}}, VerdictOK, "wp-async"},
		{[]dirty.Support{{Method: dirty.WPAsync, Err: no}, {Method: dirty.SoftDirty}, {Method: dirty.Hash}}, VerdictOptional,
			"soft-dirty, not wp-async: not here"},
		{[]dirty.Support{{Method: dirty.WPAsync, Err: no}, {Method: dirty.SoftDirty, Err: no}, {Method: dirty.Hash}}, VerdictOptional,
			"hash, not wp-async: not here, nor soft-dirty: not here"},
		{[]dirty.Support{{Method: dirty.WPAsync, Err: no}}, VerdictOptional, "wp-async: not here"},
	} {
		f := tracking(c.tried)
		if f.Verdict != c.verdict || f.Found != c.found || (f.Fix == "") != (c.verdict == VerdictOK) {
			t.Errorf("%v: %+v", c.tried, f)
		}
	}
	for _, f := range Doctor(t.Context()).Findings {
		if f.Name == "dirty tracking" && f.Found != "" && !strings.Contains(f.Found, "<nil>") {
			return
		}
	}
	t.Error("the doctor does not say how written pages are found")
}
