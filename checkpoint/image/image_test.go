package image

import (
	"bytes"
	"errors"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

func sample() *Image {
	return &Image{
		Created: time.UnixMicro(1700000000000000).UTC(),
		Host:    Host{Kernel: "6.18.0", Machine: "x86_64", XFeatures: 0xe7, XSize: 2696},
		Processes: []Process{{
			PID: 42, HostPID: 4242,
			Threads: []Thread{{TID: 42, Regs: Regs{RIP: 0x401000, RSP: 1 << 46, R15: ^uint64(0)}, XState: make([]byte, 2696), SigMask: 1, Comm: "redis"}},
			VMAs: []VMA{
				{Range: page.Range{Start: 0x400000, End: 0x402000}, Kind: VMAFile, Prot: 5, Path: "/bin/true", Memory: -1, Flags: []string{"rd", "ex"}},
				{Range: page.Range{Start: 0x500000, End: 0x600000}, Kind: VMAShared, Prot: 3, Shared: true},
			},
			FDs: []FD{{Num: 0, File: 0}, {Num: 7, File: 1, CloseOnExec: true}},
		}},
		Files:     []OpenFile{{Kind: FileDevice, Path: "/dev/null", Memory: -1}, {Kind: FileSocket, Socket: &Socket{Family: 2, Type: 1, State: SocketListening, Local: make([]byte, 16), Peer: -1}}},
		Pipes:     []Pipe{{Capacity: 65536, Data: []byte("left over")}},
		Memories:  []SharedMemory{{Size: 1 << 20, Chunks: []Chunk{{Offset: 4096, Data: []byte{1}}}}},
		Monotonic: 5 * time.Second,
	}
}

func TestRoundTrip(t *testing.T) {
	b, err := Encode(sample())
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	got.Created = got.Created.UTC()
	again, err := Encode(got)
	if err != nil || !bytes.Equal(b, again) {
		t.Fatalf("a decoded image encodes to something else (%v)", err)
	}
	if !reflect.DeepEqual(got.Processes[0].Threads[0].Regs, sample().Processes[0].Threads[0].Regs) {
		t.Fatalf("registers changed: %+v", got.Processes[0].Threads[0].Regs)
	}
}

// Every bit of an encoded image matters: no flip goes unnoticed.
func TestDamageIsNoticed(t *testing.T) {
	b, err := Encode(sample())
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		d := bytes.Clone(b)
		d[i] ^= 1 << (i % 8)
		if _, err := Decode(d); !errors.Is(err, ErrFormat) {
			t.Fatalf("flip in byte %d: %v", i, err)
		}
	}
	for n := range b {
		if _, err := Decode(b[:n]); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, harm := range map[string]func(*Image){
		"no process":          func(i *Image) { i.Processes = nil },
		"root out of range":   func(i *Image) { i.Root = 1 },
		"leader not first":    func(i *Image) { i.Processes[0].Threads[0].TID = 43 },
		"short xstate":        func(i *Image) { i.Processes[0].Threads[0].XState = nil },
		"overlapping mapping": func(i *Image) { i.Processes[0].VMAs[1].Start = 0x401000 },
		"kernel mapping":      func(i *Image) { i.Processes[0].VMAs[1].End = 1 << 63 },
		"unaligned mapping":   func(i *Image) { i.Processes[0].VMAs[0].Start++ },
		"no such memory":      func(i *Image) { i.Processes[0].VMAs[1].Memory = 1 },
		"descriptor twice":    func(i *Image) { i.Processes[0].FDs[1].Num = 0 },
		"no such file":        func(i *Image) { i.Processes[0].FDs[1].File = 2 },
		"file kind":           func(i *Image) { i.Files[0].Kind = 99 },
		"socket peer":         func(i *Image) { i.Files[1].Socket.Peer = 2 },
		"pipe overfull":       func(i *Image) { i.Pipes[0].Capacity = 1 },
		"chunk outside":       func(i *Image) { i.Memories[0].Chunks[0].Offset = 1 << 20 },
		"siginfo size":        func(i *Image) { i.Processes[0].Pending = [][]byte{{1}} },
		"mapped file":         func(i *Image) { i.Processes[0].VMAs[0].MappedFile = len(i.MappedFiles) + 1 },
		"executable":          func(i *Image) { i.Processes[0].ExeFile = -1 },
		"nameless file":       func(i *Image) { i.MappedFiles = []MappedFile{{}} },
		"anonymous file": func(i *Image) {
			i.MappedFiles = []MappedFile{{Path: "/bin/true"}}
			i.Processes[0].VMAs = []VMA{{Range: page.Range{Start: 0x1000, End: 0x2000}, Kind: VMAAnon, MappedFile: 1}}
		},
		"signal number": func(i *Image) { i.Processes[0].SigActions = []SigAction{{Signal: 65}} },
	} {
		img := sample()
		harm(img)
		if err := img.Validate(); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := sample().Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestMemoryRoundTrip(t *testing.T) {
	in := []Memory{{
		Lazy:   page.NewSet(page.Range{Start: 0x1000, End: 0x9000}, page.Range{Start: 0x7fff00000000, End: 0x7fff00001000}),
		Eager:  page.NewSet(page.Range{Start: 0x10000, End: 0x12000}),
		Hot:    page.NewSet(page.Range{Start: 0x1000, End: 0x2000}),
		Guards: page.NewSet(page.Range{Start: 0x20000, End: 0x21000}),
	}}
	out, err := ParseMemory(AppendMemory(nil, in))
	if err != nil || !reflect.DeepEqual(in, out) {
		t.Fatalf("got %v, %v", out, err)
	}
	more := []Memory{{Lazy: page.NewSet(page.Range{Start: 0x9000, End: 0xa000})}, {Space: 1, Eager: page.NewSet(page.Range{Start: 0x1000, End: 0x2000})}}
	joined := Join(in, more)
	want := []page.Range{{Start: 0x1000, End: 0xa000}, {Start: 0x7fff00000000, End: 0x7fff00001000}}
	if len(joined) != 2 || !slices.Equal(joined[0].Lazy.Ranges(), want) || joined[1].Eager.Pages() != 1 || joined[0].Hot.Pages() != 1 || in[0].Lazy.Pages() != 9 {
		t.Errorf("joined: %v", joined)
	}
	in[0].Eager.Add(page.Range{Start: 0x8000, End: 0xa000})
	if _, err := ParseMemory(AppendMemory(nil, in)); !errors.Is(err, ErrFormat) {
		t.Fatalf("lazy and eager at once: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := Encode(sample())
	f.Add(b[headerBytes:])
	f.Fuzz(func(t *testing.T, body []byte) {
		img, err := Decode(Seal(magic, body))
		if err != nil {
			return
		}
		if _, err := Encode(img); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzParseMemory(f *testing.F) {
	f.Add(AppendMemory(nil, []Memory{{Lazy: page.NewSet(page.Range{Start: 0x1000, End: 0x9000})}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ms, err := ParseMemory(b); err == nil {
			if _, err := ParseMemory(AppendMemory(nil, ms)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
