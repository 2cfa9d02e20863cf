package appliance

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/fusemem"
)

// How what has not arrived is trapped.
const (
	TrapAuto = "auto" // memory by userfaultfd; the process is shown as files
	TrapUFFD = "uffd" // the same, and nothing is shown
	TrapFUSE = "fuse" // memory and files that are not here by FUSE: not ready, refused
)

// showBeside is show, beside what follows where nothing of that needs it. Then it is no
// reason to give up for. wait returns when it is over.
func (a *arrival) showBeside(ctx context.Context, img *image.Image) (wait func(), err error) {
	if a.record.Trap == TrapFUSE {
		return func() {}, a.show(ctx, img)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.show(ctx, img); err != nil {
			a.log.Warn("the process cannot be read as files while it arrives", "err", err)
		}
	}()
	return func() { <-done }, nil
}

// show has the pager show the process as files.
func (a *arrival) show(ctx context.Context, img *image.Image) error {
	if a.record.Trap == TrapUFFD {
		return nil
	}
	p := &img.Processes[0]
	a.image.Store(img)
	m := pager.Show{Image: a.record.Trap == TrapFUSE}
	for _, f := range img.MappedFiles {
		m.Files = append(m.Files, pager.ShowFile{Path: f.Path, Size: f.File.Size, ModTime: time.Unix(0, f.File.MTimeNS), Mode: os.FileMode(f.File.Mode & 0o777)})
	}
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Window {
			continue
		}
		m.VMAs = append(m.VMAs, fusemem.VMA{Range: v.Range, Perms: perms(v), Offset: v.Offset, Dev: v.File.Dev, Ino: v.File.Ino, Path: pathOf(v)})
	}
	return a.current().Show(ctx, m)
}

// exe fetches the executable, which this host lacks.
func (a *arrival) exe(ctx context.Context, i int) (*os.File, error) {
	f := a.image.Load().MappedFiles[i]
	return restore.MakeExe(f.Path, f.File.Size, func(b []byte, at int64) error {
		return a.retry(ctx, func(p *pager.Client) error { return p.Read(ctx, i, at, b) })
	})
}

// perms are those of a mapping as /proc/PID/maps shows them.
func perms(v *image.VMA) string {
	b := []byte("---p")
	for i, p := range []int{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if v.Prot&p != 0 {
			b[i] = "rwx"[i]
		}
	}
	if v.Shared {
		b[3] = 's'
	}
	return string(b)
}

func pathOf(v *image.VMA) string {
	if v.Deleted {
		return v.Path + " (deleted)"
	}
	return v.Path
}
