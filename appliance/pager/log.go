package pager

import (
	"io"
	"os"
	"path/filepath"
	"strings"
)

// openLog opens the log of the pagers of one migration, for another of them. All
// write to its end.
func openLog(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.WriteString(logStart)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

const (
	logStart  = "-- a pager starts\n"
	logTail   = 256 << 10
	lastWords = 4 << 10
)

// LastWords is what the last pager of a migration wrote before it ended: the
// beginning of its crash where there was one, else the end of its log. Empty
// where there is none, or where Config.Log took it.
func LastWords(dir string) string {
	f, err := os.Open(filepath.Join(dir, logName))
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > logTail {
		_, _ = f.Seek(-logTail, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, logTail))
	text := string(b)
	if i := strings.LastIndex(text, logStart); i >= 0 {
		text = text[i+len(logStart):]
	}
	at := -1
	for _, begin := range []string{"panic: ", "fatal error: ", "SIG", "unexpected fault", "runtime: "} {
		if strings.HasPrefix(text, begin) {
			at = max(at, 0)
		}
		if i := strings.LastIndex(text, "\n"+begin); i >= 0 && (at < 0 || i+1 < at) {
			at = i + 1
		}
	}
	if at < 0 {
		return strings.TrimSpace(text[max(0, len(text)-lastWords):])
	}
	return strings.TrimSpace(text[at:min(len(text), at+lastWords)])
}
