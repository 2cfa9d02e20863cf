package main

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// memoryDaemon answers only where memory can be read: in a directory with three
// mappings, the last of which cannot be read.
func memoryDaemon(t *testing.T, m appliance.Memory, refuse *appliance.APIError) (socket string) {
	t.Helper()
	socket = testutil.Socket(t, "api")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	m.ID, m.Comm, m.Peer, m.Dir = "ab12cd34ef56ab78", "redis", "alpha", t.TempDir()
	maps := "00010000-00012000 rw-p 00000000 00:00 0 \n00012000-00013000 r--p 00000000 00:00 0          /a b\n00020000-00021000 rw-p 00000000 00:00 0                          [stack]\n"
	mem := make([]byte, 0x20800)
	for i := range mem {
		mem[i] = byte(i / page.Size)
	}
	copy(mem[0x11ffa:], "ferry\x00page")
	for name, content := range map[string][]byte{"maps": []byte(maps), "mem": mem} {
		if err := os.WriteFile(filepath.Join(m.Dir, name), content, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, _ *http.Request) {
		if refuse != nil {
			w.WriteHeader(http.StatusConflict)
			_ = json.NewEncoder(w).Encode(refuse)
			return
		}
		_ = json.NewEncoder(w).Encode(m)
	}
	mux.HandleFunc("GET /v1/migrations/{id}/memory", answer)
	mux.HandleFunc("POST /v1/migrations/{id}/release", answer)
	srv := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-served })
	return socket
}

func TestShowMemory(t *testing.T) {
	m := appliance.Memory{PID: 77, PagesTotal: 1 << 18, PagesResident: 1 << 16}
	socket := memoryDaemon(t, m, nil)
	show := func(args ...string) outcome {
		return command(t, nil, append([]string{"--socket", socket, "show", "ab12"}, args...)...)
	}
	o := show("--mem")
	for _, want := range []string{"redis (pid 77), as it was frozen on alpha", "/mem ", "/files/ ", "65536 of 262144 pages are here (256.0 MiB of 1.0 GiB)", "goes with the last page"} {
		if o.status != exitDone || !strings.Contains(o.out, want) {
			t.Errorf("show --mem: %d %s without %q:\n%s", o.status, o.err, want, o.out)
		}
	}
	if got := show("--mem", "--json").lastLine(t); got["pages_resident"] != float64(1<<16) || got["kept"] != false {
		t.Errorf("--json: %v", got)
	}
	kept := memoryDaemon(t, appliance.Memory{Kept: true, PagesTotal: 1}, nil)
	if o := command(t, nil, "--socket", kept, "show", "ab12", "--mem"); !strings.Contains(o.out, `until "pageferry release ab12cd34ef56"`) || !strings.Contains(o.out, "not running here yet") {
		t.Errorf("kept: %s %s", o.out, o.err)
	}
	for _, c := range []struct {
		part, out, err string
		status         int
	}{
		{"11ffa-12004", "ferry\x00page", "", exitDone},
		{"0x11ffa-0x12004", "ferry\x00page", "", exitDone},
		{"10000-10001", "\x10", "", exitDone},
		{"[stack]", strings.Repeat("\x20", 0x800), "at 20800: EOF", exitFailed}, // what there is, and then the error
		{"[heap]", "", "no mapping is called [heap]", exitUsage},
		{"12fff-13001", "", "nothing is mapped at 13000", exitUsage},
		{"13000-20001", "", "nothing is mapped at 13000", exitUsage},
		{"f000-10001", "", "nothing is mapped at f000", exitUsage},
		{"11000", "", "is not START-END", exitUsage},
		{"11000-xyz", "", "is not START-END", exitUsage},
		{"12000-11000", "", "is empty", exitUsage},
	} {
		o := show("--range", c.part)
		if o.status != c.status || o.out != c.out || !strings.Contains(o.err, c.err) || strings.Count(o.err, "\n") > 1 {
			t.Errorf("--range %s: %d, %q, %q", c.part, o.status, o.out, o.err)
		}
	}
	if o := show("--range", "10000-10001", "--json"); o.status != exitUsage {
		t.Errorf("bytes as JSON: %d %s", o.status, o.err)
	}
	if o := command(t, nil, "__complete", "--socket", socket, "show", "ab12", "--range", ""); !strings.Contains(o.out, "12000-13000\tr--p /a b\n") {
		t.Errorf("ranges complete to %q", o.out)
	}
	refused := memoryDaemon(t, m, &appliance.APIError{Kind: appliance.KindRefused, Message: "its memory cannot be read here: why"})
	for _, args := range [][]string{{"show", "ab12", "--mem"}, {"show", "ab12", "--range", "1-2"}, {"release", "ab12"}} {
		if o := command(t, nil, append([]string{"--socket", refused}, args...)...); o.status != exitRefused || !strings.Contains(o.err, "cannot be read here: why") {
			t.Errorf("%v: %d %s", args, o.status, o.err)
		}
	}
	if o := command(t, nil, "__complete", "migrate", "1", "--shown", ""); !strings.Contains(o.out, "keep") {
		t.Errorf("--shown completes to %q", o.out)
	}
}

func TestHexLines(t *testing.T) {
	var b strings.Builder
	if err := hexLines(&b, 0x7f000000000d, []byte("abc\x00\xffdefghijklmnopqrstuvw")); err != nil {
		t.Fatal(err)
	}
	const want = `7f0000000000                                          61 62 63  |             abc|
7f0000000010  00 ff 64 65 66 67 68 69  6a 6b 6c 6d 6e 6f 70 71  |..defghijklmnopq|
7f0000000020  72 73 74 75 76 77                                 |rstuvw          |
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}
