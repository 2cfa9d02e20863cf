package appliance

import (
	"context"
	"errors"
	"fmt"
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
	TrapAuto = "auto" // memory by userfaultfd, files that are not here by FUSE; the process is shown as files
	TrapUFFD = "uffd" // memory by userfaultfd, and nothing else
	TrapFUSE = "fuse" // memory by FUSE, too
)

// showing is how far the pager is with showing the process.
type showing struct {
	done chan struct{} // closed when it does, or cannot
	err  error         // why not
}

// showBeside is show, beside what follows where nothing of that needs it. Then it is no
// reason to give up for, but for files that are to be had from it, see fileAt. wait
// returns when it is over.
func (a *arrival) showBeside(ctx context.Context, img *image.Image) (wait func(), err error) {
	a.image.Store(img)
	a.showing = showing{done: make(chan struct{})}
	if a.record.Trap == TrapFUSE {
		defer close(a.showing.done)
		return func() {}, a.show(ctx, img)
	}
	go func() {
		defer close(a.showing.done)
		if a.showing.err = a.show(ctx, img); a.showing.err != nil {
			a.mu.Lock()
			a.noShow = a.showing.err
			a.mu.Unlock()
			a.log.Warn("the process cannot be read as files while it arrives", "err", a.showing.err)
		}
	}()
	return func() { <-a.showing.done }, nil
}

// fileAt is restore.Config.FileAt: what this host lacks is mapped from the mount. It
// waits for that.
func (a *arrival) fileAt(i int) (string, error) {
	<-a.showing.done
	img := a.image.Load()
	if uid, ok := user(img.Processes[0].Creds.UID); ok {
		if path, ok := a.host.kept(uid, fileOf(&img.MappedFiles[i])); ok {
			return path, nil
		}
	}
	if a.showing.err != nil {
		return "", a.showing.err
	}
	a.lacked = append(a.lacked, i)
	return fusemem.FilePath(a.host.showDir(a.id), i), nil
}

// abandonFiles sees to it that a rebuild which is given up ends. What the process waits for when
// a file shows its memory cannot be interrupted, and may never come: the mount goes.
func (a *arrival) abandonFiles(ctx context.Context) (stop func()) {
	if a.record.Trap == TrapUFFD {
		return func() {}
	}
	cancel := context.AfterFunc(ctx, func() {
		if err := pager.Hide(a.dir); err != nil {
			a.log.Error("what shows the process cannot be taken away", "err", err)
		}
	})
	return func() { cancel() }
}

// dying is how long a process that was killed may take before what shows it is taken away.
const dying = 100 * time.Millisecond

// end kills the process. If it waits for what the mount shows it cannot end before that
// has come, and nobody may be there to answer any more: the mount goes then.
func (a *arrival) end(ctx context.Context) error {
	if a.record.Trap != TrapUFFD {
		t := time.AfterFunc(dying, func() {
			if err := pager.Hide(a.dir); err != nil {
				a.log.Error("what shows the process cannot be taken away", "err", err)
			}
		})
		defer t.Stop()
	}
	return a.skeleton.End(ctx)
}

// hold has the files that the process maps from its source brought here, for modes in
// which it is not to need that any more when it runs.
func (a *arrival) hold(ctx context.Context, img *image.Image) error {
	if len(a.lacked) == 0 {
		return nil
	}
	var need uint64
	for _, i := range a.lacked {
		need += min(uint64(img.MappedFiles[i].File.Size), 1<<48) // it may be any number
	}
	if free, err := availableMemory(); err != nil || need > free {
		return errors.Join(err, fmt.Errorf("the files that it has mapped, and that are not here, have %s, of which %s are free here; mode hybrid or postcopy need not have all of them",
			mib(need), mib(free)))
	}
	return a.retry(ctx, func(p *pager.Client) error { return p.Hold(ctx, a.lacked) })
}

// show has the pager show the process as files.
func (a *arrival) show(ctx context.Context, img *image.Image) error {
	if a.record.Trap == TrapUFFD {
		return nil
	}
	p := &img.Processes[0]
	m := pager.Show{Image: a.record.Trap == TrapFUSE}
	for i := range img.MappedFiles {
		m.Files = append(m.Files, fileOf(&img.MappedFiles[i]))
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

// lacks is err, with what to do where this host lacks files.
func (a *arrival) lacks(err error) error {
	switch {
	case !errors.Is(err, restore.ErrFileDiffers) || a.record.Trap != TrapUFFD:
		return err
	case a.host.noFUSE != nil:
		return fmt.Errorf("%w; what differs would come along if the destination had FUSE: %w", err, a.host.noFUSE)
	}
	return fmt.Errorf("%w; --trap auto takes along what differs", err)
}

// exe fetches the executable, which this host lacks.
func (a *arrival) exe(ctx context.Context, i int) (*os.File, error) {
	f := a.image.Load().MappedFiles[i]
	if free, err := availableMemory(); err != nil || uint64(f.File.Size) > free { // it may be any number
		return nil, errors.Join(err, fmt.Errorf("%w: its %s would have to be in memory, of which %s are free here",
			restore.ErrFileDiffers, mib(uint64(f.File.Size)), mib(free)))
	}
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
