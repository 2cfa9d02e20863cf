package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/fxamacker/cbor/v2"

	"github.com/pageferry/pageferry/page"
)

// Version is the version of the format. A reader refuses any other: an image is
// read by the same or a newer program, which says what it still reads.
const Version = 1

// MaxBytes bounds an encoded image; a process with more state than that is not
// carried.
const MaxBytes = 1 << 30

var magic = [8]byte{'P', 'G', 'F', 'Y', 'I', 'M', 'G', '\n'}

// headerBytes: magic 8, version 2, reserved 2, length of the body 8, CRC32C of
// the body 4, CRC32C of the header so far 4.
const headerBytes = 28

// ErrFormat means that bytes are not an image, are damaged, or of another
// version. The text says which.
var ErrFormat = errors.New("image: not a usable image")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	encMode, _ = cbor.EncOptions{Time: cbor.TimeUnixMicro}.EncMode()
	decMode, _ = cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxArrayElements:  1 << 24,
		MaxMapPairs:       1 << 10,
		MaxNestedLevels:   16,
	}.DecMode()
)

// Encode returns img behind its header.
func Encode(img *Image) ([]byte, error) {
	body, err := encMode.Marshal(img)
	if err != nil {
		return nil, fmt.Errorf("image: encode: %w", err)
	}
	return Seal(magic, body), nil
}

// Decode is the opposite of Encode. It checks length, checksums, version and,
// by Validate, what the image says. Input may be hostile.
func Decode(b []byte) (*Image, error) {
	body, err := Unseal(magic, b)
	if err != nil {
		return nil, err
	}
	var img Image
	if err := decMode.Unmarshal(body, &img); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrFormat, err)
	}
	if err := img.Validate(); err != nil {
		return nil, err
	}
	return &img, nil
}

// Seal puts the header with magic, version, length and checksums before body.
func Seal(magic [8]byte, body []byte) []byte {
	b := make([]byte, 0, headerBytes+len(body))
	b = append(b, magic[:]...)
	b = binary.LittleEndian.AppendUint16(b, Version)
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(body)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(body, castagnoli))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, body...)
}

// Unseal checks and takes off what Seal put before body.
func Unseal(magic [8]byte, b []byte) ([]byte, error) {
	if len(b) < headerBytes || [8]byte(b) != magic {
		return nil, fmt.Errorf("%w: wrong magic", ErrFormat)
	}
	le := binary.LittleEndian
	if crc32.Checksum(b[:headerBytes-4], castagnoli) != le.Uint32(b[headerBytes-4:]) {
		return nil, fmt.Errorf("%w: damaged header", ErrFormat)
	}
	if v := le.Uint16(b[8:]); v != Version {
		return nil, fmt.Errorf("%w: format version %d, this program reads %d", ErrFormat, v, Version)
	}
	body := b[headerBytes:]
	if n := le.Uint64(b[12:]); n != uint64(len(body)) || n > MaxBytes {
		return nil, fmt.Errorf("%w: %d bytes where the header says %d", ErrFormat, len(body), n)
	}
	if crc32.Checksum(body, castagnoli) != le.Uint32(b[20:]) {
		return nil, fmt.Errorf("%w: damaged content", ErrFormat)
	}
	return body, nil
}

// AppendMemory appends the compact form of the maps of memory.
func AppendMemory(b []byte, ms []Memory) []byte {
	b = binary.AppendUvarint(b, uint64(len(ms)))
	for i := range ms {
		b = binary.AppendUvarint(b, uint64(ms[i].Space))
		for _, s := range ms[i].stored() {
			b = page.AppendSet(b, s)
		}
	}
	return b
}

// ParseMemory reads what AppendMemory wrote, all of b. Input may be hostile.
func ParseMemory(b []byte) ([]Memory, error) {
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)) {
		return nil, fmt.Errorf("%w: memory map", ErrFormat)
	}
	b = b[k:]
	var ms []Memory
	for range n {
		var m Memory
		sp, k := binary.Uvarint(b)
		if k <= 0 || sp >= uint64(n) {
			return nil, fmt.Errorf("%w: memory map", ErrFormat)
		}
		m.Space, b = page.Space(sp), b[k:]
		var err error
		for _, s := range m.stored() {
			if *s, b, err = page.ParseSet(b); err != nil {
				return nil, fmt.Errorf("%w: memory map: %v", ErrFormat, err)
			}
		}
		for _, e := range m.Eager.Ranges() {
			if len(m.Lazy.Intersect(e)) != 0 {
				return nil, fmt.Errorf("%w: memory map: %v is both lazy and eager", ErrFormat, e)
			}
		}
		ms = append(ms, m)
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%w: memory map: %d bytes too many", ErrFormat, len(b))
	}
	return ms, nil
}
