package fileid

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// TestHash: it is right, it is remembered, and what is remembered is not said of a
// file that has changed, even to one of the same size and time.
func TestHash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	var last string
	for _, text := range []string{"some content", "with another", "and a third!"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(1e9, 0)
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if h := Known(&st); h != "" {
			t.Errorf("%q is said to have the hash %s, that of %q has %s", text, h, "what was there", last)
		}
		want := sha256.Sum256([]byte(text))
		got, err := Hash(path)
		if err != nil || got != hex.EncodeToString(want[:]) {
			t.Errorf("%q has the hash %s, %v", text, got, err)
		}
		if Known(&st) != got {
			t.Error("it was not remembered")
		}
		last = got
	}
}

// TestNoHash: what cannot be relied on is no hash.
func TestNoHash(t *testing.T) {
	dir := t.TempDir()
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, MaxHash+1); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{large, dir, "/dev/zero"} {
		if h, err := Hash(path); !errors.Is(err, ErrHash) {
			t.Errorf("%s: %q, %v", path, h, err)
		}
	}
	written := filepath.Join(dir, "written")
	f, err := os.Create(written)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = f.WriteAt([]byte("x"), 0)
			}
		}
	}()
	if h, err := Hash(written); !errors.Is(err, ErrHash) {
		t.Errorf("a file that is written to: %q, %v", h, err)
	}
	close(stop)
	<-done
}

func TestExeName(t *testing.T) {
	for link, want := range map[string]string{
		"/usr/bin/redis": "/usr/bin/redis false false", "/usr/bin/redis (deleted)": "/usr/bin/redis true false",
		"/memfd:/usr/bin/redis (deleted)": "/usr/bin/redis true true", "/memfd:runc (deleted)": "/memfd:runc true false",
		"/memfd:/usr/bin/redis": "/memfd:/usr/bin/redis false false",
	} {
		path, deleted, memory := ExeName(link)
		if got := fmt.Sprint(path, " ", deleted, " ", memory); got != want {
			t.Errorf("%s: %s, want %s", link, got, want)
		}
	}
}

func TestBuildID(t *testing.T) {
	with := testutil.CCText(t, "with", "int main(void) { return 0; }", "-Wl,--build-id=0x0123456789abcdef")
	without := testutil.CCText(t, "without", "int main(void) { return 0; }", "-Wl,--build-id=none")
	if id := BuildID(with); id != "0123456789abcdef" {
		t.Errorf("%q", id)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("GNU"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{without, text, "/no/such/file"} {
		if id := BuildID(path); id != "" {
			t.Errorf("%s has the build id %q", path, id)
		}
	}
}

// TestKept: a copy is called by the name of its original, and files of one path are told
// apart.
func TestKept(t *testing.T) {
	one := image.FileID{Size: 5, MTimeNS: 7, BuildID: "aa"}
	kept := Keep("/var/cache/files", 7, "/usr/lib/../lib/libc.so.6", one)
	if got := Original(kept); got != "/usr/lib/libc.so.6" || !strings.HasPrefix(kept, "/var/cache/files/pageferry-file-") {
		t.Errorf("%s is called %s", kept, got)
	}
	for _, other := range []image.FileID{{Size: 6, MTimeNS: 7, BuildID: "aa"}, {Size: 5, MTimeNS: 8, BuildID: "aa"}, {Size: 5, MTimeNS: 7, Hash: "aa"}} {
		if Keep("/var/cache/files", 7, "/usr/lib/../lib/libc.so.6", other) == kept {
			t.Errorf("%+v and %+v are kept in one place", one, other)
		}
	}
	if Keep("/var/cache/files", 8, "/usr/lib/../lib/libc.so.6", one) == kept {
		t.Error("two users have one copy")
	}
	for _, path := range []string{"/usr/lib/libc.so.6", "/pageferry-file-0123/x", "/pageferry-file-" + strings.Repeat("g", keptDigits) + "/x",
		"/a/pageferry-file-" + strings.Repeat("0", keptDigits), ""} {
		if got := Original(path); got != path {
			t.Errorf("%s is called %s", path, got)
		}
	}
	if got := Original("/pageferry-file-12/x" + kept); got != "/usr/lib/libc.so.6" {
		t.Errorf("called %s", got)
	}
}
