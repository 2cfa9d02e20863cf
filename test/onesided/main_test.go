// Package onesided_test reads the memory of frozen processes one-sided: the processes
// register it themselves with an RDMA device of this program, and another device reads
// it with RDMA READ. It brings together what rdma and checkpoint each know half of.
package onesided_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/rdma"
)

// envVictim makes the test binary a daemon that lets a process register its memory
// and dies by SIGKILL at a kill point: "PID N", or "PID 0" to come through and print
// the points that it passed.
const envVictim = "PAGEFERRY_ONESIDED_VICTIM"

func TestMain(m *testing.M) {
	if v := os.Getenv(envVictim); v != "" {
		if err := victim(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}

func victim(v string) error {
	var pid, at int
	if _, err := fmt.Sscan(v, &pid, &at); err != nil {
		return err
	}
	p, err := rdma.Find(netip.MustParseAddr(farAddr))
	if err != nil {
		return err
	}
	d, err := rdma.Open(p)
	if err != nil {
		return err
	}
	n := 0
	inject.KillPoint = func(name string) {
		n++
		if at == 0 {
			fmt.Println(name)
		}
		if n == at {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := checkpoint.Open(pid, checkpoint.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Freeze(ctx); err != nil {
		return err
	}
	regs, err := register(ctx, s, d)
	if err != nil {
		return err
	}
	if len(regs.Regions) == 0 {
		return fmt.Errorf("nothing was registered: %v", regs.Refused)
	}
	inject.Point("used")
	if err := d.Close(); err != nil {
		return err
	}
	return s.Thaw(ctx)
}

// register registers all private memory of the frozen process that can be, and hands
// it to the device.
func register(ctx context.Context, s *checkpoint.Session, d *rdma.Device) (checkpoint.Registration, error) {
	maps, err := proc.ReadMaps(s.PID())
	if err != nil {
		return checkpoint.Registration{}, err
	}
	var all []page.Range
	for i := range maps {
		if maps[i].Ino == 0 || !maps[i].Shared || maps[i].Name == "/dev/zero" {
			all = append(all, maps[i].Range)
		}
	}
	return registerPages(ctx, s, d, page.NewSet(all...))
}

func registerPages(ctx context.Context, s *checkpoint.Session, d *rdma.Device, pages page.Set) (checkpoint.Registration, error) {
	l, err := d.Lend()
	if err != nil {
		return checkpoint.Registration{}, err
	}
	defer l.File.Close()
	return s.Register(ctx, checkpoint.Domain{File: l.File, Driver: l.Driver, ID: l.Domain, MaxRegions: l.MaxRegions}, pages)
}
