package fileid

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxHash is the largest file that is hashed.
const MaxHash = 256 << 20

// ErrHash: the file has no hash that could be relied on.
var ErrHash = errors.New("fileid: no hash")

// state is what a file is known by as long as nobody writes to it.
type state struct {
	dev, ino            uint64
	size, mtime, change int64
}

func stateOf(st *unix.Stat_t) state {
	return state{st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()}
}

// maxKnown bounds what is remembered; beyond it begins anew.
const maxKnown = 4096

var (
	mu    sync.Mutex
	known = map[state]string{}
)

// settled is how long ago a file must have been changed: until then it can be changed
// again without its times telling, which count ticks of the kernel's clock.
const settled = 50 * time.Millisecond

// Known is the hash of the file of that status, if Hash has found it.
func Known(st *unix.Stat_t) string {
	mu.Lock()
	defer mu.Unlock()
	return known[stateOf(st)]
}

// Hash returns the SHA-256 of a regular file in hex. It fails with ErrHash where the
// file is larger than MaxHash, is no regular one, or is written to meanwhile. Of a file
// that was changed a moment ago it waits for that to be over.
func Hash(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil { // before it is opened: that does something to a device
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > MaxHash {
		return "", fmt.Errorf("%w: %s of %d bytes is larger than %d, or no regular file", ErrHash, path, st.Size, MaxHash)
	}
	if h := Known(&st); h != "" {
		return h, nil
	}
	if age := time.Since(time.Unix(st.Ctim.Unix())); age >= 0 && age < settled {
		time.Sleep(settled - age)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var before, after unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &before); err != nil {
		return "", &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, MaxHash+1))
	if err != nil {
		return "", err
	}
	if err := unix.Fstat(int(f.Fd()), &after); err != nil {
		return "", &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if stateOf(&before) != stateOf(&after) || n != after.Size || time.Since(time.Unix(before.Ctim.Unix())) < settled {
		return "", fmt.Errorf("%w: %s is written to", ErrHash, path)
	}
	sum := hex.EncodeToString(h.Sum(nil))
	mu.Lock()
	defer mu.Unlock()
	if len(known) >= maxKnown {
		clear(known)
	}
	known[stateOf(&after)] = sum
	return sum, nil
}
