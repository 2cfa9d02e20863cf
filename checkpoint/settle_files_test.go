package checkpoint

import (
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// carried copies a program with its interpreter and libraries to dir, and returns
// how to start it there, and of which file each is a copy.
func carried(t testing.TB, dir, program string) (cmd []string, original map[string]string) {
	t.Helper()
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	interp := ""
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err != nil {
				t.Fatal(err)
			}
			interp = strings.TrimRight(string(b), "\x00")
		}
	}
	list := []string{program, interp}
	libs, err := f.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range libs {
		for _, d := range []string{filepath.Dir(interp), "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"} {
			if p := filepath.Join(d, l); !slices.Contains(list, p) {
				if _, err := os.Stat(p); err == nil {
					list = append(list, p)
					break
				}
			}
		}
	}
	original = map[string]string{}
	for _, p := range list {
		original["/"+filepath.Base(p)] = p // as it is called in maps
		b, err := os.ReadFile(p)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(p)), b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return []string{filepath.Join(dir, filepath.Base(interp)), "--library-path", dir, filepath.Join(dir, filepath.Base(program))}, original
}

// fromFiles reads what is not backed by back from the file itself.
func fromFiles(back func(proc.Mapping) Backing) func(proc.Mapping) Backing {
	return func(m proc.Mapping) Backing {
		if b := back(m); !b.Later {
			return b
		}
		return Backing{Read: func(_ context.Context, offset uint64, buf []byte) error {
			f, err := os.Open(filepath.Join(os.Getenv(envTmpfs), m.Name))
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.ReadAt(buf, int64(offset))
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return err
		}}
	}
}

// The binary, the C library and the dynamic linker that a program runs in are
// replaced while it does, along with its memory.
func TestSettleProgramAndLibraries(t *testing.T) {
	for _, how := range []string{"copied", "mapped", "not there"} {
		t.Run(how, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64)
			testutil.NoLeaks(t)
			dir, dev := privateTmpfs(t)
			cmd, original := carried(t, dir, testutil.CC(t, "veiled"))
			v := runVeiled(t, dir, dev, cmd, 8, 1024, 8)
			text := executable(t, v, func(m proc.Mapping) bool { return m.Dev == dev })
			if text < 3 {
				t.Fatalf("only %d executable mappings come from the mount", text)
			}
			cfg := v.config()
			const image = "/image"
			cfg.Backing = func(m proc.Mapping) Backing {
				if m.Name == image {
					return v.backing(m)
				}
				b := fromFiles(func(proc.Mapping) Backing { return Backing{Later: true} })(m)
				switch how {
				case "mapped":
					b.Path = original[m.Name]
				case "not there":
					b.Path = "/nowhere/" + m.Name
				}
				return b
			}
			cfg.Stopped = func(ctx context.Context, parts []SettlePart) (z page.Set, err error) {
				return v.stopped(ctx, slices.DeleteFunc(slices.Clone(parts), func(p SettlePart) bool { return p.Ino != v.ino }))
			}
			rep := settleAll(t, v.Pid(), cfg, v.shadows()...)
			t.Log(&rep)
			now := executable(t, v, func(m proc.Mapping) bool {
				if how != "mapped" {
					return m.Ino == 0 && m.Name == ""
				}
				// The name of a library is mostly a link.
				for _, o := range original {
					if to, err := filepath.EvalSymlinks(o); err == nil && to == m.Name {
						return true
					}
				}
				return false
			})
			if now != text {
				t.Errorf("%d executable mappings became %d", text, now)
			}
			v.noTrace(t)
			v.finish(t)
		})
	}
}

// executable counts such mappings of those that ours says are.
func executable(t testing.TB, v *veiled, ours func(proc.Mapping) bool) (n int) {
	t.Helper()
	maps, err := proc.ReadMaps(v.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Prot&unix.PROT_EXEC != 0 && ours(m) {
			n++
		}
	}
	return n
}
