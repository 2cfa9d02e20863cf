package vm

import (
	"bytes"
	"fmt"
)

// archive writes a cpio archive of the form "newc", which initramfs are made of:
// Documentation/driver-api/early-userspace/buffer-format.rst.
type archive struct {
	buf   bytes.Buffer
	inode int
}

// newArchive begins one behind what is there already.
func newArchive(before []byte) *archive {
	a := &archive{}
	a.buf.Write(before)
	a.pad()
	return a
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) entry(name string, mode, major, minor int, data []byte) {
	a.inode++
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

const (
	modeFile = 0o100000 // inode(7)
	modeDir  = 0o040000
	modeChar = 0o020000
)

func (a *archive) dir(name string) { a.entry(name, modeDir|0o755, 0, 0, nil) }

func (a *archive) file(name string, perm int, data []byte) {
	a.entry(name, modeFile|perm, 0, 0, data)
}

// console is the device of the kernel's console.
func (a *archive) console(name string) { a.entry(name, modeChar|0o600, 5, 1, nil) }

// end returns the archive. It cannot be added to after that.
func (a *archive) end() []byte {
	a.inode = -1 // the trailer has none
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.buf.Bytes()
}
