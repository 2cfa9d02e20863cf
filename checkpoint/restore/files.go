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
		out = append(out, lacking(img, &img.Processes[i], SameFile)...)
	}
	return out
}

// lacking is that for one process, with same to compare a file, see SameFile.
func lacking(img *image.Image, p *image.Process, same func(path string, want image.FileID) error) (out []Lack) {
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
			if u.shared {
				err = sameSize(v.Path, v.File)
			} else {
				err = same(v.Path, v.File)
			}
		}
		if err != nil {
			at[u] = len(out)
			out = append(out, Lack{File: u.file, Mapped: true, What: fmt.Sprintf("mapping %v of %s", v.Range, v.Path), Err: err})
		}
	}
	if p.ExeFile == 0 {
		if p.Exe != "" {
			if err := same(p.Exe, image.FileID{}); err != nil {
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
	} else if err := same(exe.Path, exe.File); err != nil {
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
	sealed := sealedFiles(r.p)
	same := SameFile
	if r.cfg.FileAt != nil {
		same = seemsSame
	}
	for _, l := range lacking(r.img, r.p, same) {
		at, err := "", error(nil)
		switch {
		case !l.Mapped:
		case l.File < 0 || r.cfg.FileAt == nil:
			err = l.Err
		case sealed[l.File]: // it would be the process's for as long as it lives
			err = fmt.Errorf("%w, and it cannot be mapped from elsewhere, for the mapping is sealed", l.Err)
		default:
			if at, err = r.cfg.FileAt(l.File); err != nil {
				err = fmt.Errorf("%w, and it cannot be had from elsewhere: %w", l.Err, err)
			}
		}
		if err == nil && l.Exe && (l.File < 0 || r.cfg.Exe == nil) {
			err = l.Err
		}
		if err != nil {
			all = append(all, about(err, "%s", l.What))
			continue
		}
		if l.Mapped {
			r.from[l.File] = at
		}
		if l.Exe {
			r.exe = r.fetchExe(l.File)
		}
		r.cfg.Log.Debug("not here, and taken from elsewhere", "pid", r.p.PID, "file", l.What, "at", at, "err", l.Err)
	}
	return errors.Join(all...)
}

// sealedFiles are those of Image.MappedFiles of which there are mappings that cannot be
// replaced (mseal(2)).
func sealedFiles(p *image.Process) map[int]bool {
	out := map[int]bool{}
	for i := range p.VMAs {
		if v := &p.VMAs[i]; v.MappedFile > 0 && v.Has("sl") {
			out[v.MappedFile-1] = true
		}
	}
	return out
}

// SameFile tells whether the file at path is the one that want describes: of
// the same size, and of the same time, build id or content, which it may have to read.
func SameFile(path string, want image.FileID) error { return sameFile(path, want, fileid.Hash) }

// seemsSame is SameFile for when the process stands still: what would have to be read
// first counts as another one, as it can be had from elsewhere.
func seemsSame(path string, want image.FileID) error {
	return sameFile(path, want, func(string) (string, error) {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return "", err
		}
		if h := fileid.Known(&st); h != "" {
			return h, nil
		}
		return "", errors.New("and its content is not known yet")
	})
}

// sameSize is SameFile of a shared mapping, whose file changes with every store to it.
func sameSize(path string, want image.FileID) error { return sameFile(path, want, nil) }

// sameFile has hash say what the content is, and compares nothing but the size where
// that is nil.
func sameFile(path string, want image.FileID, hash func(path string) (string, error)) error {
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
	if hash == nil || st.Mtim.Nano() == want.MTimeNS {
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
	sum, err := hash(path)
	if err != nil {
		return fmt.Errorf("%w: changed at another time than the source's: %w", ErrFileDiffers, err)
	}
	if sum != want.Hash {
		return fmt.Errorf("%w: SHA-256 %s here, %s on the source", ErrFileDiffers, sum, want.Hash)
	}
	return nil
}
