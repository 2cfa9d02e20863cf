package link

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// Port is the name of the virtio serial port.
const Port = "pageferry.link"

// EnvGuest is set to 1 in the environment of what runs in a guest.
const EnvGuest = "PAGEFERRY_GUEST"

// Kind is what a frame says.
type Kind byte

const (
	KindStart   Kind = iota + 1 // to the guest: Start
	KindStarted                 // nothing: the command runs
	KindStdout                  // bytes of its standard output
	KindStderr                  // bytes of its standard error
	KindFile                    // File
	KindEnded                   // Ended
	KindFailed                  // text: why there was nothing to start, or no end
)

// Start is the command that the guest shall run.
type Start struct {
	Args    []string
	Env     []string
	Dir     string
	Keep    []string // paths below /tmp that are the host's
	Collect []string // files whose content is wanted afterwards
}

// File is one that was asked for and is there.
type File struct {
	Name string
	Data []byte
}

// Ended is how the command ended: by exiting, or by a signal.
type Ended struct {
	Code   int // exit status; 0 where Signal is not
	Signal int // 0 where it exited
}

// MaxPayload bounds a frame, in bytes: a longer one is a broken link.
const MaxPayload = 16 << 20

// head is a frame's kind and the length of its payload, little-endian.
const head = 1 + 4

// Write writes a frame in one call. Callers see to it that one does at a time.
func Write(w io.Writer, k Kind, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("link: a frame of %d bytes, at most %d are allowed", len(payload), MaxPayload)
	}
	b := make([]byte, head, head+len(payload))
	b[0] = byte(k)
	binary.LittleEndian.PutUint32(b[1:], uint32(len(payload)))
	_, err := w.Write(append(b, payload...))
	return err
}

// WriteJSON writes a frame whose payload is v.
func WriteJSON(w io.Writer, k Kind, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return Write(w, k, b)
}

// Read reads a frame. Its error is io.EOF where the link ends before one.
func Read(r io.Reader) (Kind, []byte, error) {
	var b [head]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(b[1:])
	if n > MaxPayload {
		return 0, nil, fmt.Errorf("link: a frame of %d bytes, at most %d are allowed", n, MaxPayload)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Kind(b[0]), payload, nil
}
