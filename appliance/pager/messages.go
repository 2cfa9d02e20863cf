package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// settings is what a new pager is told: Config without what is the client's.
type settings struct {
	ID           transport.MigrationID `cbor:"1,keyasint"`
	Dir          string                `cbor:"2,keyasint"`
	KeeperCgroup string                `cbor:"3,keyasint,omitempty"`
	TLS          *TLS                  `cbor:"4,keyasint,omitempty"`
	Window       int                   `cbor:"5,keyasint"`
	Chunk        int                   `cbor:"6,keyasint"`
	BulkLanes    int                   `cbor:"7,keyasint"`
	StallTimeout time.Duration         `cbor:"8,keyasint"`
	// OldKeeper is the keeper of the pager in whose place this one comes; 0
	// for a new migration.
	OldKeeper int           `cbor:"9,keyasint,omitempty"`
	HeadStart time.Duration `cbor:"10,keyasint,omitempty"`
	IdleSleep bool          `cbor:"11,keyasint,omitempty"`
	ShowDir   string        `cbor:"12,keyasint,omitempty"`
}

// who is the answer to opHello and opWho, and what the state file holds.
type who struct {
	ID          transport.MigrationID `cbor:"1,keyasint"`
	PID         int                   `cbor:"2,keyasint"`
	Start       uint64                `cbor:"3,keyasint"` // of PID, in clock ticks after boot
	Keeper      int                   `cbor:"4,keyasint"`
	KeeperStart uint64                `cbor:"5,keyasint"`
}

type laneMsg struct {
	Lane transport.LaneID `cbor:"1,keyasint"`
	Key  []byte           `cbor:"2,keyasint"`
}

type epochMsg struct {
	Epoch uint32 `cbor:"1,keyasint"`
}

type fileMsg struct {
	Space page.Space  `cbor:"1,keyasint"`
	Index []FileRange `cbor:"2,keyasint"`
	Sums  []uint32    `cbor:"3,keyasint,omitempty"`
}

type adoptMsg struct {
	Space   page.Space `cbor:"1,keyasint"`
	PID     int        `cbor:"2,keyasint"`
	UFFD    bool       `cbor:"3,keyasint"` // descriptors come in this order
	Mem     bool       `cbor:"4,keyasint"`
	Regions []Region   `cbor:"5,keyasint"`
	Lazy    page.Set   `cbor:"6,keyasint"`
	Eager   page.Set   `cbor:"7,keyasint"`
	Hot     page.Set   `cbor:"8,keyasint"`
	Veil    bool       `cbor:"9,keyasint,omitempty"` // its descriptor is the last
	Views   []View     `cbor:"10,keyasint,omitempty"`
	Group   string     `cbor:"11,keyasint,omitempty"`
	Kept    page.Set   `cbor:"12,keyasint"`
}

// readMsg asks for a part of a file.
type readMsg struct {
	File   int   `cbor:"1,keyasint"`
	Offset int64 `cbor:"2,keyasint"`
	Bytes  int   `cbor:"3,keyasint"`
}

// shownReply is the answer to opShown.
type shownReply struct {
	Dev   uint64 `cbor:"1,keyasint"`
	Show  Show   `cbor:"2,keyasint"`
	Views []View `cbor:"3,keyasint"`
	Image uint64 `cbor:"4,keyasint"`
}

// rangesMsg asks what there is of the source's pages of Ranges.
type rangesMsg struct {
	Ranges []page.Range `cbor:"1,keyasint"`
	PID    int          `cbor:"2,keyasint"`
	At     page.Range   `cbor:"3,keyasint"` // where it sees them
}

// unveilMsg says that shadows are about to take the place of what is seen of them in
// process PID, which stands still: Shadows[i] has the pages of Ranges[i].
type unveilMsg struct {
	PID     int          `cbor:"1,keyasint"`
	At      []page.Range `cbor:"4,keyasint"` // where it sees them
	Ranges  []page.Range `cbor:"2,keyasint"`
	Shadows []page.Addr  `cbor:"3,keyasint"`
	// Again: it did not come to that.
	Again bool `cbor:"5,keyasint,omitempty"`
}

// veilReply is the answer to both.
type veilReply struct {
	Missing page.Set `cbor:"1,keyasint"`
	GivenUp page.Set `cbor:"2,keyasint"`
	Own     page.Set `cbor:"3,keyasint"` // addresses of the process
}

type eventMsg struct {
	Kind  EventKind        `cbor:"1,keyasint"`
	Stats Stats            `cbor:"2,keyasint"`
	Lane  transport.LaneID `cbor:"3,keyasint"`
	Err   string           `cbor:"4,keyasint,omitempty"`
	Code  string           `cbor:"5,keyasint,omitempty"`
}

const (
	socketName = "pager.sock"
	stateName  = "pager.state"
	storeName  = "pageferry-store"
	logName    = "pager.log"
)

// startTime is when pid started, in clock ticks after boot: with it a pid means
// one process for good.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// proc_pid_stat(5): field 22, counted behind the last parenthesis.
	_, rest, ok := cutLast(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is not as expected", pid)
	}
	var v uint64
	_, err = fmt.Sscan(f[19], &v)
	return v, err
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// openProcess returns a pidfd of pid, which must have started at start; 0 means
// that nobody knows. ErrGone where there is no such process.
func openProcess(pid int, start uint64) (fd int, err error) {
	if pid <= 0 {
		return -1, ErrGone
	}
	fd, err = unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, ErrGone
	}
	if err != nil {
		return -1, fmt.Errorf("pager: pidfd of %d: %w", pid, err)
	}
	got, err := startTime(pid)
	if err != nil || start != 0 && got != start {
		unix.Close(fd)
		return -1, ErrGone
	}
	return fd, nil
}

// endProcess kills the process behind a pidfd and waits until it has ended.
func endProcess(fd int, limit time.Duration) error {
	err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pager: kill: %w", err)
	}
	if !waitProcess(fd, limit) {
		return errors.New("pager: process does not end after SIGKILL")
	}
	return nil
}

// waitProcess waits until the process behind a pidfd has ended.
func waitProcess(fd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(max(0, time.Until(end).Milliseconds())))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return false
		}
	}
}

// writeState and readState keep who in Dir, for a restarted daemon.
func writeState(dir string, w who) error {
	b := fmt.Appendf(nil, "%s %d %d %d %d\n", w.ID, w.PID, w.Start, w.Keeper, w.KeeperStart)
	tmp := filepath.Join(dir, stateName+".new")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("pager: state file: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, stateName)); err != nil {
		return fmt.Errorf("pager: state file: %w", err)
	}
	return nil
}

func readState(dir string) (w who, err error) {
	b, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		return w, err
	}
	var id []byte
	if n, err := fmt.Sscanf(string(b), "%x %d %d %d %d", &id, &w.PID, &w.Start, &w.Keeper, &w.KeeperStart); n != 5 || err != nil || len(id) != len(w.ID) {
		return w, fmt.Errorf("pager: state file in %s is not as expected", dir)
	}
	copy(w.ID[:], id)
	return w, nil
}

// Sentinels cross the control connection by name.
var codes = map[string]error{
	"gone": ErrGone, "lost": ErrLost, "peer": transport.ErrPeer, "closed": transport.ErrClosed,
	"source": stream.ErrGone, "damaged": transport.ErrDamaged, "auth": transport.ErrAuth,
}

func codeOf(err error) string {
	for name, s := range codes {
		if errors.Is(err, s) {
			return name
		}
	}
	return ""
}

// remoteError is an error of the pager, as the client sees it.
type remoteError struct {
	text string
	is   error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }

func errorOf(text, code string) error {
	if text == "" {
		return nil
	}
	return &remoteError{text, codes[code]}
}
