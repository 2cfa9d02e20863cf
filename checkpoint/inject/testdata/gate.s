# What holds all other threads until one has run its batch, should the tracer die
# meanwhile.
#   r15  the gate: 32 bits that are 1 while it is shut, 32 of padding, and the
#        address of the resume trampoline of the thread that runs the batch
#   rbx  of a thread that waits: its own resume trampoline
park:
	cmpl	$1, (%r15)
	jne	through
	mov	$202, %eax		# futex
	mov	%r15, %rdi
	mov	$128, %esi		# FUTEX_WAIT | FUTEX_PRIVATE_FLAG
	mov	$1, %edx
	xor	%r10d, %r10d
	syscall
	jmp	park
through:
	jmp	*%rbx
	.balign	64, 0xcc
# Where the thread that runs the batch goes on when nobody has stopped it.
open:
	movl	$0, (%r15)
	mov	$202, %eax
	mov	%r15, %rdi
	mov	$129, %esi		# FUTEX_WAKE | FUTEX_PRIVATE_FLAG
	mov	$0x7fffffff, %edx
	syscall
	jmp	*8(%r15)
