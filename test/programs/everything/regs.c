/*
 * Registers: every register a thread has is loaded with known values, held for
 * a while (spinning, or sleeping in the kernel) and looked at.
 */
#include "everything.h"

#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>

/* hold is loaded into the registers and stored from them; the assembler below
 * knows its offsets. */
struct hold {
	uint8_t v[32][64];  /* 0 */
	uint64_t k[8];      /* 2048 */
	double st[8];       /* 2112 */
	uint64_t gpr[8];    /* 2176: rbx rbp r12 r13 r14 r15 r9 r10 */
	uint32_t mxcsr;     /* 2240 */
	uint16_t cw, pad;   /* 2244 */
	int64_t rax;        /* 2248: what nanosleep returned */
};

/* Preconditions: the x87 stack is empty, as the ABI says. ts may be NULL. */
void hold_zmm(const struct hold *in, struct hold *out, long spins, const struct timespec *ts);
void hold_ymm(const struct hold *in, struct hold *out, long spins, const struct timespec *ts);
void hold_xmm(const struct hold *in, struct hold *out, long spins, const struct timespec *ts);

#define ENTER \
	"push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n" \
	"sub $16, %rsp; stmxcsr (%rsp); fnstcw 4(%rsp)\n" \
	"mov %rcx, %r8\n" \
	"fldcw 2244(%rdi); ldmxcsr 2240(%rdi)\n" \
	".irp n, 7,6,5,4,3,2,1,0\n fldl 2112+8*\\n(%rdi)\n .endr\n"
#define GPRS_IN \
	"mov 2176(%rdi), %rbx; mov 2184(%rdi), %rbp; mov 2192(%rdi), %r12; mov 2200(%rdi), %r13\n" \
	"mov 2208(%rdi), %r14; mov 2216(%rdi), %r15; mov 2224(%rdi), %r9; mov 2232(%rdi), %r10\n"
#define WAIT \
	"1: pause; dec %rdx; jnz 1b\n" \
	"xor %eax, %eax; test %r8, %r8; jz 2f\n" \
	"push %rdi; push %rsi; mov %r8, %rdi; xor %esi, %esi; mov $35, %eax; syscall\n" \
	"pop %rsi; pop %rdi\n" \
	"2: mov %rax, 2248(%rsi)\n"
#define LEAVE \
	"mov %rbx, 2176(%rsi); mov %rbp, 2184(%rsi); mov %r12, 2192(%rsi); mov %r13, 2200(%rsi)\n" \
	"mov %r14, 2208(%rsi); mov %r15, 2216(%rsi); mov %r9, 2224(%rsi); mov %r10, 2232(%rsi)\n" \
	".irp n, 0,1,2,3,4,5,6,7\n fstpl 2112+8*\\n(%rsi)\n .endr\n" \
	"fnstcw 2244(%rsi); stmxcsr 2240(%rsi)\n" \
	"fldcw 4(%rsp); ldmxcsr (%rsp); add $16, %rsp\n" \
	"pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
#define R16 "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define R32 R16 ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"

__asm__(".text\n"
	".type hold_zmm, @function\nhold_zmm:\n" ENTER
	".irp n, " R32 "\n vmovdqu64 64*\\n(%rdi), %zmm\\n\n .endr\n"
	".irp n, 1,2,3,4,5,6,7\n kmovq 2048+8*\\n(%rdi), %k\\n\n .endr\n" GPRS_IN WAIT
	".irp n, " R32 "\n vmovdqu64 %zmm\\n, 64*\\n(%rsi)\n .endr\n"
	".irp n, 1,2,3,4,5,6,7\n kmovq %k\\n, 2048+8*\\n(%rsi)\n .endr\n" LEAVE
	"vzeroupper; ret\n.size hold_zmm, .-hold_zmm\n"
	".type hold_ymm, @function\nhold_ymm:\n" ENTER
	".irp n, " R16 "\n vmovdqu 64*\\n(%rdi), %ymm\\n\n .endr\n" GPRS_IN WAIT
	".irp n, " R16 "\n vmovdqu %ymm\\n, 64*\\n(%rsi)\n .endr\n" LEAVE
	"vzeroupper; ret\n.size hold_ymm, .-hold_ymm\n"
	".type hold_xmm, @function\nhold_xmm:\n" ENTER
	".irp n, " R16 "\n movdqu 64*\\n(%rdi), %xmm\\n\n .endr\n" GPRS_IN WAIT
	".irp n, " R16 "\n movdqu %xmm\\n, 64*\\n(%rsi)\n .endr\n" LEAVE
	"ret\n.size hold_xmm, .-hold_xmm\n");

static void (*hold)(const struct hold *, struct hold *, long, const struct timespec *);
static int vectors, width, masks;

static void fill(struct hold *h, uint64_t *r)
{
	for (int i = 0; i < vectors; i++)
		for (int j = 0; j < width; j += 8) {
			uint64_t v = rnd(r);
			memcpy(&h->v[i][j], &v, 8);
		}
	for (int i = 1; i < masks; i++)
		h->k[i] = rnd(r);
	for (int i = 0; i < 8; i++) {
		h->st[i] = (double)(int64_t)rnd(r);
		h->gpr[i] = rnd(r);
	}
	h->mxcsr = 0x1f80 | (rnd(r) & 3) << 13 | (rnd(r) & 1) << 15; /* rounding, flush to zero */
	h->cw = 0x37f & ~0xc00;
	h->cw |= (rnd(r) & 3) << 10;
}

static void compare(const struct hold *a, const struct hold *b, const char *how)
{
	for (int i = 0; i < vectors; i++)
		check(memcmp(a->v[i], b->v[i], width) == 0, "vector register %d of %d bytes changed while %s", i, width, how);
	for (int i = 1; i < masks; i++)
		check(a->k[i] == b->k[i], "mask register k%d changed while %s", i, how);
	for (int i = 0; i < 8; i++) {
		check(memcmp(&a->st[i], &b->st[i], 8) == 0, "x87 register %d changed while %s", i, how);
		check(a->gpr[i] == b->gpr[i], "general register %d changed while %s", i, how);
	}
	check(a->mxcsr == b->mxcsr, "mxcsr was %#x, is %#x after %s", a->mxcsr, b->mxcsr, how);
	check(a->cw == b->cw, "x87 control word was %#x, is %#x after %s", a->cw, b->cw, how);
	check(b->rax == 0, "nanosleep returned %ld with all registers held", (long)b->rax);
}

static __thread uint64_t state, in_tls;
static __thread unsigned long gs;

static void body(void *arg)
{
	struct hold in = { 0 }, out = { 0 };
	struct timespec ts = { 0, 1000000 };
	unsigned long now = 0;
	uint64_t mine = (uint64_t)(uintptr_t)arg;
	uint64_t r;

	if (!state) {
		state = mine * 0x9e3779b97f4a7c15ULL;
		in_tls = mine;
		gs = (mine << 12) + 0x10000;
		must(syscall(SYS_arch_prctl, ARCH_SET_GS, gs));
	}
	r = rnd(&state);
	fill(&in, &r);
	if (r & 1) {
		hold(&in, &out, 200 + (long)(r >> 8 & 0x3ff), NULL);
		compare(&in, &out, "spinning");
	}
	/* Mostly it sleeps: many threads must not need much processor. */
	ts.tv_nsec = 1000000 + (long)(r >> 20 & 0xffffff);
	if (opt.threads > 32)
		ts.tv_nsec *= 4;
	hold(&in, &out, 1, &ts);
	compare(&in, &out, "sleeping");
	check(in_tls == mine, "a TLS variable changed");
	must(syscall(SYS_arch_prctl, ARCH_GET_GS, &now));
	check(now == gs, "gs base was %#lx, is %#lx", gs, now);
}

void regs_start(void)
{
	__builtin_cpu_init();
	if (has("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
		hold = hold_zmm, vectors = 32, width = 64, masks = 8;
	else if (has("avx") && __builtin_cpu_supports("avx2"))
		hold = hold_ymm, vectors = 16, width = 32;
	else
		hold = hold_xmm, vectors = 16, width = 16;
	for (long i = 1; i <= opt.threads; i++) {
		char name[16];

		snprintf(name, sizeof(name), "regs %ld", i);
		start(name, body, (void *)i);
	}
}
