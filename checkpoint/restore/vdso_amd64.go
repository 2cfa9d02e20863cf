package restore

import "encoding/binary"

// appendJump appends a jump to an absolute address. It clobbers rax, which a
// called function may.
func appendJump(b []byte, to uint64) []byte {
	b = append(b, 0x48, 0xb8) // mov rax, imm64
	b = binary.LittleEndian.AppendUint64(b, to)
	return append(b, 0xff, 0xe0) // jmp rax
}
