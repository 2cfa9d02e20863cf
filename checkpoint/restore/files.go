package restore

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// checkFiles looks at every file that the process has mapped, before anything
// is made: what is missing is better known early. All that is wrong is reported.
func checkFiles(p *image.Process) error {
	type use struct {
		path   string
		shared bool
	}
	seen := map[use]bool{}
	var all []error
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Kind != image.VMAFile && v.Kind != image.VMAFileShared {
			continue
		}
		u := use{v.Path, v.Kind == image.VMAFileShared}
		if seen[u] {
			continue
		}
		seen[u] = true
		if v.Deleted {
			all = append(all, about(ErrFileDiffers, "mapping %v of %s: deleted on the source", v.Range, v.Path))
			continue
		}
		if err := checkFile(v.Path, v.File, u.shared); err != nil {
			all = append(all, about(err, "mapping %v of %s", v.Range, v.Path))
		}
	}
	if p.Exe != "" {
		var st unix.Stat_t
		if err := unix.Stat(p.Exe, &st); err != nil {
			all = append(all, about(fmt.Errorf("%w: %w", ErrFileDiffers, err), "executable %s", p.Exe))
		}
	}
	return errors.Join(all...)
}

// checkFile tells whether the file at path is the one that want describes: of
// the same size, and of the same time or build id. Of a shared mapping, whose
// file changes with every store to it, only the size counts.
func checkFile(path string, want image.FileID, shared bool) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("%w: %w", ErrFileDiffers, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%w: not a regular file here", ErrFileDiffers)
	}
	if want == (image.FileID{}) {
		return nil
	}
	if st.Size != want.Size {
		return fmt.Errorf("%w: %d bytes here, %d on the source", ErrFileDiffers, st.Size, want.Size)
	}
	if shared || st.Mtim.Nano() == want.MTimeNS {
		return nil
	}
	if want.BuildID == "" {
		return fmt.Errorf("%w: changed at another time than the source's, and without a build id to compare", ErrFileDiffers)
	}
	id, err := buildID(path)
	if err != nil {
		return fmt.Errorf("%w: build id: %w", ErrFileDiffers, err)
	}
	if id != want.BuildID {
		return fmt.Errorf("%w: build id %s here, %s on the source", ErrFileDiffers, id, want.BuildID)
	}
	return nil
}

// buildID reads the GNU build id of an ELF file, in hex.
func buildID(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	e, err := elf.NewFile(f)
	if err != nil {
		return "", err
	}
	for _, p := range e.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return "", err
		}
		if id := noteGNU(b, e); id != "" {
			return id, nil
		}
	}
	return "", errors.New("the file has none")
}

// noteGNU finds NT_GNU_BUILD_ID among notes.
func noteGNU(b []byte, e *elf.File) string {
	const ntGNUBuildID = 3
	pad := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(b) >= 12 {
		namesz, descsz, typ := e.ByteOrder.Uint32(b), e.ByteOrder.Uint32(b[4:]), e.ByteOrder.Uint32(b[8:])
		b = b[12:]
		n, d := pad(namesz), pad(descsz)
		if n > uint64(len(b)) || d > uint64(len(b))-n {
			return ""
		}
		if typ == ntGNUBuildID && namesz == 4 && bytes.Equal(b[:4], []byte("GNU\x00")) {
			return hex.EncodeToString(b[n : n+uint64(descsz)])
		}
		b = b[n+d:]
	}
	return ""
}
