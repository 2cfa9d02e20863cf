package fileid

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// A host may keep copies of files that processes had mapped elsewhere. Each lies at the
// path of the file, below a directory that tells files of one path apart: keptPrefix and
// keptDigits hexadecimal digits.
const (
	keptPrefix = "pageferry-file-"
	keptDigits = 32
)

// Keep is where a host that keeps such files in dir keeps f for processes of a user,
// which is called path at its source. Users do not share copies: what a file is called,
// and known by, is in the hands of who has mapped it there.
func Keep(dir string, uid uint32, path string, f image.FileID) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %q %d %d %q %q", uid, path, f.Size, f.MTimeNS, f.BuildID, f.Hash))
	return filepath.Join(dir, keptPrefix+hex.EncodeToString(sum[:])[:keptDigits], filepath.Clean("/"+path))
}

// Original is what the file at path was called where it came from: path itself, unless
// it is the copy that a host has kept.
func Original(path string) string {
	at := path
	for {
		_, rest, ok := strings.Cut(at, "/"+keptPrefix)
		if !ok {
			return path
		}
		if digits, of, ok := strings.Cut(rest, "/"); ok && len(digits) == keptDigits && strings.Trim(digits, "0123456789abcdef") == "" {
			return "/" + of
		}
		at = rest
	}
}
