package fileid

import "strings"

// ExeName is what the executable is called of which /proc/PID/exe says link, and
// whether that name leads to it no more. A process that was rebuilt on a host without
// its executable has that in memory: a memfd named after the file, whose name it is
// called by.
func ExeName(link string) (path string, deleted, memory bool) {
	path, deleted = strings.CutSuffix(link, " (deleted)")
	if of, ok := strings.CutPrefix(path, "/memfd:"); ok && deleted && strings.HasPrefix(of, "/") {
		return of, true, true
	}
	return path, deleted, false
}
