package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// Show is what a pager is to show of its process as files, in Config.ShowDir.
type Show struct {
	VMAs  []fusemem.VMA `cbor:"1,keyasint"`
	Files []ShowFile    `cbor:"2,keyasint"`
	// Image: there is also a file for veiled memory.
	Image bool `cbor:"3,keyasint"`
}

// ShowFile is a file that the process has mapped. Number i of them is the source's
// space page.FirstFileSpace + i.
type ShowFile struct {
	Path    string      `cbor:"1,keyasint"`
	Size    int64       `cbor:"2,keyasint"`
	ModTime time.Time   `cbor:"3,keyasint"`
	Mode    os.FileMode `cbor:"4,keyasint"`
	// By what it is known: see image.FileID. Nobody has it who has a file of that name
	// where it was Deleted.
	BuildID string `cbor:"5,keyasint,omitempty"`
	Hash    string `cbor:"6,keyasint,omitempty"`
	Deleted bool   `cbor:"7,keyasint,omitempty"`
}

// Hide takes away what a pager that was killed has left mounted, by what it wrote to
// dir. Idempotent. Nothing of it may be needed any more.
func Hide(dir string) error {
	old, err := readShown(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := fusemem.Unmount(old.Dir); err != nil {
		return err
	}
	for _, name := range []string{old.Dir, filepath.Join(dir, shownName)} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// shown is what a pager that takes over must know of what its predecessor showed.
type shown struct {
	Dir    string `cbor:"6,keyasint"`
	Show   Show   `cbor:"1,keyasint"`
	Device int    `cbor:"2,keyasint"` // number of the descriptor of /dev/fuse
	Views  []View `cbor:"3,keyasint"`
	Group  string `cbor:"4,keyasint"` // cgroup of the process
	PID    int    `cbor:"5,keyasint"`
	// Backed are mappings of files that pages are written to before the process runs;
	// ascending.
	Backed []Backed `cbor:"7,keyasint,omitempty"`
	// Held are the numbers of descriptors of files that are here.
	Held map[int]int `cbor:"8,keyasint,omitempty"`
	// Needed: the process has mappings of what is shown.
	Needed bool `cbor:"9,keyasint,omitempty"`
}

func readShown(dir string) (s shown, err error) {
	b, err := os.ReadFile(filepath.Join(dir, shownName))
	if err == nil {
		err = cbor.Unmarshal(b, &s)
	}
	if err != nil {
		err = fmt.Errorf("pager: what was shown of the process: %w", err)
	}
	return s, err
}

const shownName = "pager.show"

func (s *server) saveShown() error {
	b, err := cbor.Marshal(s.shown)
	if err != nil {
		return err
	}
	path := filepath.Join(s.cfg.Dir, shownName)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return fmt.Errorf("pager: %w", err)
	}
	return os.Rename(path+".new", path)
}

// show mounts.
func (s *server) show(m Show) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fs != nil {
		return errors.New("pager: the process is shown already")
	}
	if s.cfg.ShowDir == "" {
		return errors.New("pager: there is no directory to show the process in")
	}
	s.shown = shown{Dir: s.cfg.ShowDir, Show: m}
	if err := s.saveShown(); err != nil { // before: whoever clears up must find it
		return err
	}
	if err := os.Mkdir(s.cfg.ShowDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("pager: %w", err)
	}
	f, err := fusemem.Mount(s.showConfig())
	if err != nil {
		return err
	}
	s.shown.Device = f.DeviceFD()
	if err := s.saveShown(); err != nil {
		return errors.Join(err, f.Close())
	}
	s.fs = f
	go s.runFS(f)
	return nil
}

func (s *server) runFS(f *fusemem.FS) {
	if err := f.Run(context.Background()); err != nil {
		s.log.Error("what is shown of the process cannot be read any more", "err", err)
	}
}

func (s *server) showConfig() fusemem.Config {
	c := fusemem.Config{
		Dir: s.shown.Dir, VMAs: s.shown.Show.VMAs, Memory: s.fetch.Source(0), Log: s.log,
		Status: func() any { return s.stats() }, Resident: s.residentBits,
	}
	for i, f := range s.shown.Show.Files {
		c.Files = append(c.Files, fusemem.File{Path: f.Path, Size: f.Size, ModTime: f.ModTime, Mode: f.Mode,
			Source: s.fileSource(i)})
	}
	if s.shown.Show.Image {
		c.Image = lateImage{s}
	}
	return c
}

// residentBits has a bit for each page with content, in order of address, that is set
// where it is here.
func (s *server) residentBits() []byte {
	src := s.store.Source(0)
	if src == nil {
		return nil
	}
	b := make([]byte, (src.Len()+7)/8)
	for i := range src.Len() {
		if !src.Wanted(i) {
			b[i/8] |= 1 << (i % 8)
		}
	}
	return b
}

// unshow takes everything away. Nothing is mapped of it any more.
func (s *server) unshow() error {
	s.unveilAll()
	s.mu.Lock()
	f := s.fs
	s.fs = nil
	var err error
	if f != nil { // whoever takes over now needs nothing of it
		s.shown.Device, s.shown.Views = 0, nil
		err = s.saveShown()
	}
	s.mu.Unlock()
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	return errors.Join(err, Hide(s.cfg.Dir)) // also what could not be taken over
}

// unveilAll ends the service of veiled memory. Nothing is veiled any more.
func (s *server) unveilAll() {
	s.mu.Lock()
	v := s.veiled.Swap(nil)
	s.mu.Unlock()
	if v != nil {
		v.veil.Halt()
		v.veil.Leave()
		v.ahead.close()
	}
}

// veil begins to serve veiled memory.
func (s *server) veil(src *pagestore.Source, m *adoptMsg, fd, mem int) error {
	if err := src.Veil(); err != nil {
		return err
	}
	if err := src.AddVeilFD(fd); err != nil {
		return err
	}
	v, err := s.newVeiled(src, m.PID, mem, m.Group, m.Views)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.shown.Views, s.shown.Group, s.shown.PID = m.Views, m.Group, m.PID
	err = s.saveShown()
	s.veiled.Store(v)
	s.mu.Unlock()
	go s.runVeil(v)
	return err
}

func (s *server) runVeil(v *veiled) {
	if err := v.veil.Run(); err != nil {
		s.log.Error("the program is not followed any more where it gives memory up", "err", err)
	}
}

// takeShown takes over what the last pager showed. descriptor fetches one of its
// descriptors under the same number.
func (s *server) takeShown(descriptor func(n int) error) error {
	was, err := readShown(s.cfg.Dir)
	if errors.Is(err, os.ErrNotExist) || err == nil && was.Device == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	s.shown = was
	if len(was.Backed) > 0 {
		s.backed.Store(&was.Backed)
	}
	if err := descriptor(s.shown.Device); err != nil {
		return err
	}
	for i, fd := range was.Held {
		if i < 0 || i >= len(was.Show.Files) {
			return fmt.Errorf("pager: file %d of %d is held", i, len(was.Show.Files))
		}
		if err := descriptor(fd); err != nil {
			return err
		}
		s.haveHeld(i, fd)
	}
	var v *veiled
	src := s.store.Source(0)
	if src != nil && src.Veiled() {
		for _, fd := range src.VeilFDs() {
			if err := descriptor(fd); err != nil {
				return err
			}
		}
		mem := -1
		for _, sp := range src.Spaces() {
			if !sp.Forked() {
				mem = sp.MemFD()
			}
		}
		v, err = s.newVeiled(src, s.shown.PID, mem, s.shown.Group, s.shown.Views)
		if err != nil {
			return err
		}
	}
	if s.fs, err = fusemem.Takeover(s.showConfig(), s.shown.Device); err != nil {
		if v != nil {
			v.ahead.close()
		}
		return err
	}
	if v != nil {
		s.veiled.Store(v)
	}
	go s.runFS(s.fs)
	return nil
}

// lateImage is the image as soon as there is one.
type lateImage struct{ s *server }

func (l lateImage) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	v := l.s.veiled.Load()
	if v == nil {
		return errors.New("pager: no memory is veiled")
	}
	// The program would get SIGBUS: it waits, as at a userfaultfd.
	for wait := time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := v.ReadPages(ctx, first, buf, prio)
		if err == nil {
			break
		}
		if ctx.Err() != nil || l.s.store.Flag(pagestore.FlagPoisoned) {
			return err
		}
		l.s.log.Warn("a page that the program waits for", "page", first.Addr(), "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	v.ahead.demanded(first)
	return nil
}
