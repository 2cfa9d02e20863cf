package appliance

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// noPages is a tracker that is to hear of nothing.
type noPages struct {
	dirty.Tracker
	t *testing.T
}

func (n noPages) Sent(rs []page.Range, _ []byte) {
	n.t.Errorf("pages %v of a file were noted as memory", rs)
}

// TestFilesAreNotTracked: what is read of a file is not taken for memory at the same
// addresses.
func TestFilesAreNotTracked(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	c := testutil.StartCmd(t, exec.Command("sleep", "1000"), time.Minute)
	s, err := checkpoint.Open(c.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	testutil.Eventually(t, 10*time.Second, func() error { return s.Freeze(t.Context()) })
	img, _, err := s.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := newProcess(s, c.Pid(), SourceOptions{})
	p.tracker = noPages{t: t}
	p.running.Store(true)
	i := img.Processes[0].ExeFile - 1
	want, err := os.ReadFile(img.MappedFiles[i].Path)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, page.Size)
	if err := p.ReadPages(page.FirstFileSpace+page.Space(i), []page.Range{{End: page.Size}}, buf); err != nil || !bytes.Equal(buf, want[:page.Size]) {
		t.Errorf("the executable begins with %q: %v", buf[:16], err)
	}
	if err := p.ReadPages(page.FirstFileSpace+1000, []page.Range{{End: page.Size}}, buf); err == nil {
		t.Error("a file that there is not was read")
	}
	p.tracker = nil
}

// TestExecutableIsBounded: a size that the source says is not believed.
func TestExecutableIsBounded(t *testing.T) {
	a := &arrival{}
	a.image.Store(&image.Image{MappedFiles: []image.MappedFile{{Path: "/bin/x", File: image.FileID{Size: 1 << 62}}}})
	f, err := a.exe(t.Context(), 0) // it would ask a pager that there is not
	if err == nil || f != nil || !strings.Contains(err.Error(), "are free here") {
		t.Errorf("%v, %v", f, err)
	}
}
