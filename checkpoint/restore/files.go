package restore

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
)

// Lack is a file that a process has mapped, or that is its executable, and that this
// host has not, or has another one of.
type Lack struct {
	// File is its index in Image.MappedFiles, where the source can give it, else -1.
	File int
	// Exe: it is the executable. Mapped: there are mappings of it.
	Exe, Mapped bool
	What        string // "mapping 7f00-7f10 of /usr/lib/libc.so.6"
	Err         error  // wraps ErrFileDiffers
}

func (l *Lack) Error() string { return l.What + ": " + l.Err.Error() }
func (l *Lack) Unwrap() error { return l.Err }

// Lacking looks at every file that the processes of img have mapped privately or
// shared, and at their executables: once each, in the order of the mappings.
func Lacking(img *image.Image) (out []Lack) {
	for i := range img.Processes {
		out = append(out, lacking(img, &img.Processes[i])...)
	}
	return out
}

func lacking(img *image.Image, p *image.Process) (out []Lack) {
	type use struct {
		file   int
		path   string
		shared bool
	}
	at := map[use]int{} // in out, -1 for one that is here
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Kind != image.VMAFile && v.Kind != image.VMAFileShared {
			continue
		}
		u := use{v.MappedFile - 1, v.Path, v.Kind == image.VMAFileShared}
		if _, ok := at[u]; ok {
			continue
		}
		at[u] = -1
		err := fmt.Errorf("%w: deleted on the source", ErrFileDiffers)
		if !v.Deleted {
			err = checkFile(v.Path, v.File, u.shared)
		}
		if err != nil {
			at[u] = len(out)
			out = append(out, Lack{File: u.file, Mapped: true, What: fmt.Sprintf("mapping %v of %s", v.Range, v.Path), Err: err})
		}
	}
	if p.ExeFile == 0 {
		if p.Exe != "" {
			if err := checkFile(p.Exe, image.FileID{}, false); err != nil {
				out = append(out, Lack{File: -1, Exe: true, What: "executable " + p.Exe, Err: err})
			}
		}
		return out
	}
	exe := &img.MappedFiles[p.ExeFile-1]
	if k, ok := at[use{p.ExeFile - 1, exe.Path, false}]; ok {
		if k >= 0 {
			out[k].Exe = true
		}
	} else if err := checkFile(exe.Path, exe.File, false); err != nil {
		out = append(out, Lack{File: p.ExeFile - 1, Exe: true, What: "executable " + exe.Path, Err: err})
	}
	return out
}

// elsewhere is from where files are mapped that this host lacks, by their index.
type elsewhere map[int]string

// path is from where v is mapped.
func (e elsewhere) path(v *image.VMA) string {
	if at, ok := e[v.MappedFile-1]; ok {
		return at
	}
	return v.Path
}

// checkFiles looks at every file that the process has mapped, before anything
// is made: what is missing is better known early. All that is wrong is reported, but
// for what can be had from elsewhere.
func (r *rebuild) checkFiles() error {
	r.from = elsewhere{}
	var all []error
	for _, l := range lacking(r.img, r.p) {
		at := ""
		if l.Mapped && l.File >= 0 && r.cfg.FileAt != nil {
			at = r.cfg.FileAt(l.File)
		}
		switch {
		case l.Mapped && at == "", l.Exe && (l.File < 0 || r.cfg.Exe == nil):
			all = append(all, about(l.Err, "%s", l.What))
			continue
		case l.Mapped:
			r.from[l.File] = at
		}
		if l.Exe {
			r.exe = r.fetchExe(l.File)
		}
		r.cfg.Log.Debug("not here, and taken from elsewhere", "pid", r.p.PID, "file", l.What, "at", at, "err", l.Err)
	}
	return errors.Join(all...)
}

// checkFile tells whether the file at path is the one that want describes: of
// the same size, and of the same time, build id or content. Of a shared mapping, whose
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
	if want.BuildID != "" {
		if id := fileid.BuildID(path); id != want.BuildID {
			return fmt.Errorf("%w: build id %q here, %s on the source", ErrFileDiffers, id, want.BuildID)
		}
		return nil
	}
	if want.Hash == "" {
		return fmt.Errorf("%w: changed at another time than the source's, and without a build id or a hash to compare", ErrFileDiffers)
	}
	hash, err := fileid.Hash(path)
	if err != nil {
		return fmt.Errorf("%w: changed at another time than the source's: %w", ErrFileDiffers, err)
	}
	if hash != want.Hash {
		return fmt.Errorf("%w: SHA-256 %s here, %s on the source", ErrFileDiffers, hash, want.Hash)
	}
	return nil
}
