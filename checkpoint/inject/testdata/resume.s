# The resume trampoline: puts back all that the stub used, without writing
# anywhere, and goes on in the program. Its data follows it.
resume:
	mov	$14, %eax
	mov	$2, %edi
	lea	all(%rip), %rsi
	mov	$0, %edx
	mov	$8, %r10d
	syscall
	lea	flags(%rip), %rsp
	popf
	mov	rsp_(%rip), %rsp
	mov	$14, %eax
	mov	$2, %edi
	lea	mask(%rip), %rsi
	mov	$0, %edx
	mov	$8, %r10d
	syscall
	mov	r15_(%rip), %r15
	mov	r14_(%rip), %r14
	mov	r13_(%rip), %r13
	mov	r12_(%rip), %r12
	mov	rbp_(%rip), %rbp
	mov	rbx_(%rip), %rbx
	mov	r11_(%rip), %r11
	mov	r10_(%rip), %r10
	mov	r9_(%rip), %r9
	mov	r8_(%rip), %r8
	mov	rax_(%rip), %rax
	mov	rcx_(%rip), %rcx
	mov	rdx_(%rip), %rdx
	mov	rsi_(%rip), %rsi
	mov	rdi_(%rip), %rdi
	jmp	*rip_(%rip)
	.balign 8, 0xcc
all:	.quad -1
mask:	.quad 0
flags:	.quad 0
rip_:	.quad 0
rsp_:	.quad 0
r15_:	.quad 0
r14_:	.quad 0
r13_:	.quad 0
r12_:	.quad 0
rbp_:	.quad 0
rbx_:	.quad 0
r11_:	.quad 0
r10_:	.quad 0
r9_:	.quad 0
r8_:	.quad 0
rax_:	.quad 0
rcx_:	.quad 0
rdx_:	.quad 0
rsi_:	.quad 0
rdi_:	.quad 0
