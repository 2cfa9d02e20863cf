package fusemem

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/pageferry/pageferry/page"
)

// ErrUnmapped says that a page belongs to no mapping. Sources may wrap it; readers get EIO, as for
// any other error.
var ErrUnmapped = errors.New("fusemem: no mapping has this address")

// Config is what a mount shows. Dir and Memory must be set. Between a pager and the one that takes
// over from it VMAs, Files and whether there is an Image must be equal.
type Config struct {
	// Dir is the mount point, a directory that is there and that only root can enter.
	Dir string
	// VMAs are the mappings, ascending.
	VMAs []VMA
	// Memory is the memory as frozen; page number is address >> page.Shift.
	Memory page.Source
	// Files are the files that the process has mapped.
	Files []File
	// Image backs map/image; page number is offset >> page.Shift. Default: there is none.
	Image page.Source
	// Status is shown by status, as JSON. It is called from any goroutine, as is Resident. Default: {}.
	Status func() any
	// Resident is shown by resident. Default: empty.
	Resident func() []byte
	// ReadAheadKB is how far the kernel reads ahead. Default: 1024.
	ReadAheadKB int
	// Log gets what nobody can be told otherwise. Default: nothing is logged.
	Log *slog.Logger
}

// VMA is one mapping: its range, and what its line in maps says.
type VMA struct {
	page.Range
	Perms  string // "rw-p"
	Offset uint64 // bytes into the file
	Dev    uint64 // as makedev gives it
	Ino    uint64
	Path   string
}

// File is one file that the process has mapped.
type File struct {
	// Path is where it was at the source.
	Path    string
	Size    int64
	ModTime time.Time
	// Mode only tells whether the file may be executed.
	Mode fs.FileMode
	// Source has page n at offset n << page.Shift. What it gives beyond Size is not shown.
	Source page.Source
}

// memSize is the size of mem: the user half of the address space with four levels of page tables.
// imageSize is that of map/image.
const (
	memSize   = 1 << 47
	imageSize = 1 << 62
)

// prepare checks the configuration and fills in defaults.
func (c *Config) prepare() error {
	if c.Dir == "" || c.Memory == nil {
		return errors.New("fusemem: Config needs Dir and Memory")
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return fmt.Errorf("fusemem: %w", err)
	}
	c.Dir = dir
	at := page.Addr(0)
	for _, v := range c.VMAs {
		if v.Empty() || !v.Aligned() || v.Start < at {
			return fmt.Errorf("fusemem: mapping %v is empty, not aligned or not in order", v.Range)
		}
		at = v.End
	}
	for i, f := range c.Files {
		if f.Source == nil || f.Size < 0 {
			return fmt.Errorf("fusemem: file %d, %q, has no source or a negative size", i, f.Path)
		}
	}
	if c.ReadAheadKB <= 0 {
		c.ReadAheadKB = 1024
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Status == nil {
		c.Status = func() any { return struct{}{} }
	}
	if c.Resident == nil {
		c.Resident = func() []byte { return nil }
	}
	return nil
}
