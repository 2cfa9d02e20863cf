package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	want := [][]byte{[]byte("one"), nil, bytes.Repeat([]byte{0xa5}, 1<<20)}
	for i, p := range want {
		if err := Write(&b, Kind(i+1), p); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(b.Bytes())
	for i, p := range want {
		k, got, err := Read(&b)
		if err != nil || k != Kind(i+1) || !bytes.Equal(got, p) {
			t.Fatalf("frame %d: kind %d, %d bytes, %v", i, k, len(got), err)
		}
	}
	if _, _, err := Read(&b); err != io.EOF {
		t.Errorf("after the last: %v, want io.EOF", err)
	}
	for _, n := range []int{1, head, head + 1} {
		if _, _, err := Read(bytes.NewReader(whole[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	if err := Write(io.Discard, KindStdout, make([]byte, MaxPayload+1)); err == nil {
		t.Error("a frame that is too long was written")
	}
}

// Whatever comes, no more memory is taken than a frame may have.
func FuzzRead(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0})
	f.Add(binary.LittleEndian.AppendUint32([]byte{3}, MaxPayload+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, payload, err := Read(bytes.NewReader(b))
		if err == nil && head+len(payload) > len(b) {
			t.Errorf("%d bytes of payload from %d", len(payload), len(b))
		}
	})
}
