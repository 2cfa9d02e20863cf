package pager

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os/exec"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// holder is a process with random memory at the place of the arrival's.
const holder = `
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv) {
	long n = argc > 1 ? atol(argv[1]) * 4096 : 0;
	uint64_t *p = mmap((void *)0x200000000000, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	uint64_t x = 88172645463325252UL;
	for (long i = 0; i < n / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		p[i] = x;
	}
	puts("ready");
	fflush(stdout);
	pause();
}
`

type holding struct{ m *proc.Memory }

func (h holding) ReadPages(_ page.Space, rs []page.Range, buf []byte) error {
	return h.m.ReadPages(rs, buf)
}

// startHolder starts a source of n pages.
func startHolder(tb testing.TB, n int) holding {
	tb.Helper()
	cmd := exec.Command(testutil.CCText(tb, "holder", holder), fmt.Sprint(n))
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		tb.Fatal(err)
	}
	m, err := proc.OpenMemory(cmd.Process.Pid)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.Close() })
	return holding{m}
}

// BenchmarkStream measures the background stream alone: from a process, over
// plain lanes on loopback, into a process.
func BenchmarkStream(b *testing.B) {
	const pages = 256 << 10
	for _, lanes := range []int{1, 2, 3} {
		for _, chunk := range []int{64 << 10, 128 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("lanes=%d/chunk=%dKiB", lanes, chunk>>10), func(b *testing.B) {
				src := startHolder(b, pages)
				b.SetBytes(pages * page.Size)
				for range b.N {
					b.StopTimer()
					r := newRigWith(b, src, func(c *Config) { c.Chunk, c.Window, c.BulkLanes = chunk, 2*chunk, lanes })
					p := startProgram(b, "touch", pages, 1, 1)
					r.connect(lanes)
					a := p.adoption()
					a.Lazy = page.NewSet(a.Regions[0].Range)
					if err := r.c.Adopt(context.Background(), a); err != nil {
						b.Fatal(err)
					}
					p.uffd.Close()
					b.StartTimer()
					r.do("fetch", r.c.Fetch)
					r.do("resident", r.c.WaitResident)
					b.StopTimer()
					r.do("finish", r.c.Finish)
					p.Kill()
					r.close()
				}
			})
		}
	}
}
