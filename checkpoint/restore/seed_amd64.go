package restore

import (
	"encoding/binary"

	"github.com/pageferry/pageferry/page"
)

// The seed is a static executable of one segment: its headers, its code, and
// behind them zeroed memory that serves as the stub area of checkpoint/inject.
// It lies where neither position dependent nor position independent programs,
// the heaps of common allocators, Go's arenas or a sanitizer's shadow lie, so
// that the area need rarely be moved for the process to come.
const (
	seedBase  page.Addr = 0x2e00_0000_0000
	seedCode            = seedBase + elfHeaderBytes + 2*elfPhdrBytes
	areaBytes           = 32 << 20

	elfHeaderBytes = 64
	elfPhdrBytes   = 56
)

// seedArea is where the seed has its stub area, seedText the page with its code.
var (
	seedText = page.Range{Start: seedBase, End: seedBase + page.Size}
	seedArea = page.Range{Start: seedText.End, End: seedText.End + areaBytes}
)

// The seed only waits. What it does besides, it is made to do.
var seedPause = []byte{
	0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
	0x0f, 0x05, // syscall
	0xeb, 0xf7, // jmp back to the mov
}

// seedReap is the life of the init of a pid namespace: it waits for children,
// adopted ones included, and ends when there are none left. The kernel then
// takes the namespace down.
var seedReap = []byte{
	0xb8, 61, 0, 0, 0, // mov eax, SYS_wait4
	0x48, 0xc7, 0xc7, 0xff, 0xff, 0xff, 0xff, // mov rdi, -1
	0x31, 0xf6, // xor esi, esi
	0xba, 0x00, 0x00, 0x00, 0x40, // mov edx, __WALL
	0x45, 0x31, 0xd2, // xor r10d, r10d
	0x0f, 0x05, // syscall
	0x48, 0x83, 0xf8, 0xf6, // cmp rax, -ECHILD
	0x75, 0xe2, // jne back to the mov
	0x31, 0xff, // xor edi, edi
	0xb8, 231, 0, 0, 0, // mov eax, SYS_exit_group
	0x0f, 0x05, // syscall
}

// Where the two loops begin.
const (
	seedPauseAt = uint64(seedCode)
	seedReapAt  = uint64(seedCode) + 16
)

// seedELF is the executable.
func seedELF() []byte {
	code := make([]byte, 16, 64)
	copy(code, seedPause)
	code = append(code, seedReap...)
	size := uint64(elfHeaderBytes + 2*elfPhdrBytes + len(code))

	const (
		etExec, emX86_64         = 2, 62
		ptLoad, ptGNUStack       = 1, 0x6474e551
		pfX, pfW, pfR            = 1, 2, 4
		class64, little, version = 2, 1, 1
	)
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', class64, little, version, 15: 0}
	b = le.AppendUint16(b, etExec)
	b = le.AppendUint16(b, emX86_64)
	b = le.AppendUint32(b, version)
	b = le.AppendUint64(b, uint64(seedCode)) // entry
	b = le.AppendUint64(b, elfHeaderBytes)   // program headers
	b = le.AppendUint64(b, 0)                // section headers
	b = le.AppendUint32(b, 0)                // flags
	for _, v := range []uint16{elfHeaderBytes, elfPhdrBytes, 2, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	phdr := func(typ, flags uint32, addr, filesz, memsz, align uint64) {
		b = le.AppendUint32(b, typ)
		b = le.AppendUint32(b, flags)
		for _, v := range []uint64{0, addr, addr, filesz, memsz, align} {
			b = le.AppendUint64(b, v)
		}
	}
	phdr(ptLoad, pfR|pfW|pfX, uint64(seedBase), size, uint64(seedArea.End-seedBase), page.Size)
	// Without this one the kernel assumes an executable stack.
	phdr(ptGNUStack, pfR|pfW, 0, 0, 0, 16)
	return append(b, code...)
}
