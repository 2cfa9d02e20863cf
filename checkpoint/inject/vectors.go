package inject

import (
	"io"

	"golang.org/x/sys/unix"
)

// vectors is memory of a process paired with buffers of ours.
type vectors struct {
	local  []unix.Iovec
	remote []unix.RemoteIovec
}

func (v *vectors) add(addr uint64, buf []byte) {
	if len(buf) == 0 {
		return
	}
	v.local = append(v.local, unix.Iovec{Base: &buf[0], Len: uint64(len(buf))})
	v.remote = append(v.remote, unix.RemoteIovec{Base: uintptr(addr), Len: len(buf)})
}

func (v *vectors) write(pid int) error { return v.move(pid, unix.ProcessVMWritev) }
func (v *vectors) read(pid int) error  { return v.move(pid, unix.ProcessVMReadv) }

func (v *vectors) move(pid int, f func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error)) error {
	const most = 1024 // IOV_MAX
	for i := 0; i < len(v.local); i += most {
		j := min(i+most, len(v.local))
		want := 0
		for _, r := range v.remote[i:j] {
			want += r.Len
		}
		n, err := f(pid, v.local[i:j], v.remote[i:j], 0)
		if err != nil {
			return err
		}
		if n != want {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}
