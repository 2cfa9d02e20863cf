package fileid

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"io"
	"os"
)

// BuildID returns the GNU build id of an ELF file in hex, or nothing.
func BuildID(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil || string(magic[:]) != elf.ELFMAG {
		return ""
	}
	e, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	for _, p := range e.Progs {
		const most = 1 << 16
		if p.Type != elf.PT_NOTE || p.Filesz > most {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			continue
		}
		if id := gnuBuildID(e, b, p.Align); id != nil {
			return hex.EncodeToString(id)
		}
	}
	return ""
}

// gnuBuildID finds the NT_GNU_BUILD_ID among notes.
func gnuBuildID(e *elf.File, b []byte, align uint64) []byte {
	const ntGNUBuildID = 3
	if align != 8 {
		align = 4
	}
	up := func(n uint32) uint64 { return (uint64(n) + align - 1) &^ (align - 1) }
	for len(b) >= 12 {
		nameSize, descSize, typ := e.ByteOrder.Uint32(b), e.ByteOrder.Uint32(b[4:]), e.ByteOrder.Uint32(b[8:])
		b = b[12:]
		if up(nameSize)+uint64(descSize) > uint64(len(b)) {
			return nil
		}
		desc := b[up(nameSize):][:descSize]
		if typ == ntGNUBuildID && bytes.Equal(b[:nameSize], []byte("GNU\x00")) {
			return desc
		}
		b = b[min(uint64(len(b)), up(nameSize)+up(descSize)):]
	}
	return nil
}
