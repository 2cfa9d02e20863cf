package vm

import (
	"slices"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	const name = "linux-image-"
	for _, c := range []struct{ want, of string }{
		{"6.12.117+deb12-amd64", "6.1.0-47-amd64 6.12-amd64 6.12.9+deb12-amd64 6.12.117+deb12-amd64 6.12.117+deb12-cloud-amd64 6.12.118+deb12-rt-amd64 6.12.119+deb12-amd64-unsigned 6.16.3+deb12-amd64"},
		{"6.12.48+deb13-amd64", "6.12.48+deb13-amd64 6.12.41+deb13-amd64 amd64"},
		{"6.16.12+deb14+1-amd64", "6.16.12+deb14-amd64 6.16.12+deb14+1-amd64 6.1.0-47-amd64"},
		{"6.1.0-56-amd64", "6.1.0-6-amd64 6.1.0-56-amd64 6.1.0-56-amd64-dbg"},
		{"", "amd64 6.12-amd64 6.12.1+deb12-cloud-amd64 6.12.1+deb13-arm64"},
	} {
		var names []string
		for n := range strings.FieldsSeq(c.of) {
			names = append(names, name+n)
		}
		for range 2 {
			if got := choose(names); strings.TrimPrefix(got, name) != c.want {
				t.Errorf("of %s: %q, want %s", c.of, got, c.want)
			}
			slices.Reverse(names)
		}
	}
}

func TestNeeded(t *testing.T) {
	data := []byte("\x7fELF\x00license=GPL\x00depends=ib_core,udp-tunnel\x00softdep=pre: crc32c-a crc32c-b post: late\x00depends=\x00name=x\x00")
	needs, likes := needed(data)
	if !slices.Equal(needs, []string{"ib_core", "udp-tunnel"}) || !slices.Equal(likes, []string{"crc32c-a", "crc32c-b"}) {
		t.Errorf("needs %q, likes %q", needs, likes)
	}
}

func TestUnsigned(t *testing.T) {
	const mark = "~Module signature appended~\n"
	code := "\x7fELF code"
	signed := code + "SIGNATURE" + "\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x09" + mark
	if got := string(unsigned([]byte(signed))); got != code {
		t.Errorf("%q", got)
	}
	for _, s := range []string{"", code, mark, "short" + mark, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff" + mark} {
		if got := string(unsigned([]byte(s))); got != s {
			t.Errorf("%q became %q", s, got)
		}
	}
}

// Archives can follow each other, and each entry begins at a multiple of four.
func TestArchive(t *testing.T) {
	first := newArchive(nil)
	first.file("a", 0o644, []byte("12345"))
	a := newArchive(first.end())
	a.dir("d")
	a.file("d/init", 0o755, []byte("#!"))
	b := a.end()
	if n := strings.Count(string(b), "TRAILER!!!"); n != 2 {
		t.Errorf("%d trailers, want 2", n)
	}
	for at, rest := 0, string(b); ; {
		i := strings.Index(rest, "070701")
		if i < 0 {
			break
		}
		if at += i; at%4 != 0 {
			t.Errorf("an entry at %d", at)
		}
		at, rest = at+6, rest[i+6:]
	}
	if len(b)%4 != 0 {
		t.Errorf("%d bytes", len(b))
	}
}
