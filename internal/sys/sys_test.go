package sys

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStructSizes(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"user_regs_struct", SizeOf[Regs](), 27 * 8},
		{"ptrace_rseq_configuration", SizeOf[RseqConfiguration](), 24},
		{"rseq_cs", SizeOf[RseqCS](), 32},
		{"ptrace_sud_config", SizeOf[SyscallUserDispatch](), 32},
		{"ptrace_peeksiginfo_args", SizeOf[peekSiginfoArgs](), 16},
		{"siginfo_t", SizeOf[Siginfo](), 128},
		{"kernel_sigaction", SizeOf[KernelSigaction](), 32},
		{"stack_t", SizeOf[StackT](), 24},
		{"sigevent", SizeOf[Sigevent](), 64},
		{"itimerspec", SizeOf[Itimerspec](), 32},
		{"itimerval", SizeOf[Itimerval](), 32},
		{"prctl_mm_map", SizeOf[PrctlMMMap](), 104},
		{"clone_args", SizeOf[CloneArgs](), 88},
		{"cap_data", SizeOf[CapData](), 12},
		{"cap_header", SizeOf[CapHeader](), 8},
		{"sched_attr", SizeOf[SchedAttr](), 48},
		{"pm_scan_arg", SizeOf[PMScanArg](), 96},
		{"procmap_query", SizeOf[ProcmapQuery](), 104},
		{"page_region", SizeOf[PageRegion](), 24},
		{"uffdio_api", SizeOf[uffdioAPI](), 24},
		{"uffdio_range", SizeOf[uffdioRange](), 16},
		{"uffdio_register", SizeOf[uffdioRegister](), 32},
		{"uffdio_copy", SizeOf[uffdioCopy](), 40},
		{"uffdio_zeropage", SizeOf[uffdioRangeMode](), 32},
		{"uffdio_writeprotect", SizeOf[uffdioWriteprotect](), 24},
		{"ib_uverbs_ioctl_hdr with three attributes", SizeOf[UverbsCommand](), 24 + 3*16},
		{"ib_uverbs_attr", SizeOf[UverbsAttr](), 16},
		{"ib_uverbs_reg_mr", SizeOf[UverbsMR](), 40},
		{"ib_uverbs_reg_mr_resp", SizeOf[UverbsMRResult](), 12},
	} {
		if c.got != c.want {
			t.Errorf("struct %s has %d bytes, the kernel's %d", c.name, c.got, c.want)
		}
	}
}

// The numbers as the headers' macros give them.
func TestIoctlNumbers(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want uintptr
	}{
		{"UFFDIO_API", UFFDIO_API, 0xc018aa3f},
		{"UFFDIO_REGISTER", UFFDIO_REGISTER, 0xc020aa00},
		{"UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, 0x8010aa01},
		{"UFFDIO_WAKE", UFFDIO_WAKE, 0x8010aa02},
		{"UFFDIO_COPY", UFFDIO_COPY, 0xc028aa03},
		{"UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE, 0xc020aa04},
		{"UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, 0xc018aa06},
		{"PAGEMAP_SCAN", PAGEMAP_SCAN, 0xc0606610},
		{"PROCMAP_QUERY", PROCMAP_QUERY, 0xc0686611},
		{"RDMA_VERBS_IOCTL", RDMA_VERBS_IOCTL, 0xc0181b01},
	} {
		if c.got != c.want {
			t.Errorf("%s = %#x, want %#x", c.name, c.got, c.want)
		}
	}
}

func TestNotSupportedNamesTheVersion(t *testing.T) {
	err := missing("PAGEMAP_SCAN", "6.7", unix.ENOTTY)
	if !errors.Is(err, ErrNotSupported) || !errors.Is(err, unix.ENOTTY) {
		t.Fatalf("%v is neither ErrNotSupported nor ENOTTY", err)
	}
	var ns *NotSupported
	if !errors.As(err, &ns) || ns.Since != "6.7" {
		t.Fatalf("no version in %v", err)
	}
	if err := missing("x", "1", unix.EPERM); err != unix.EPERM {
		t.Fatalf("EPERM became %v", err)
	}
}

func TestUffdMessages(t *testing.T) {
	var b [3*UffdMsgSize + 5]byte
	b[0] = UffdEventPagefault
	b[8], b[17] = UffdPagefaultFlagWrite, 0x10
	b[32] = UffdEventRemap
	b[32+9], b[32+17], b[32+25] = 0x10, 0x20, 0x30
	b[64] = UffdEventRemove
	b[64+9], b[64+17] = 1, 2
	ms := DecodeUffdMsgs(b[:], nil)
	if len(ms) != 3 {
		t.Fatalf("%d messages", len(ms))
	}
	if m := ms[0]; m.Addr != 0x1000 || m.Flags != UffdPagefaultFlagWrite {
		t.Errorf("pagefault %+v", m)
	}
	if m := ms[1]; m.From != 0x1000 || m.To != 0x2000 || m.Len != 0x3000 {
		t.Errorf("remap %+v", m)
	}
	if m := ms[2]; m.Start != 0x100 || m.End != 0x200 {
		t.Errorf("remove %+v", m)
	}
}
