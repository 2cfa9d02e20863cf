# The stub: runs the records from r12 on, r13 of them.
#   rbx  where to go on when nobody has stopped us: the resume trampoline
#   ebp  the signal that ends a batch
stub:
	test	%r13, %r13
	jz	done
	testb	$4, 72(%r12)
	jnz	copy
	mov	(%r12), %rax
	mov	8(%r12), %rdi
	mov	16(%r12), %rsi
	mov	24(%r12), %rdx
	mov	32(%r12), %r10
	mov	40(%r12), %r8
	mov	48(%r12), %r9
	syscall
	mov	%rax, 56(%r12)
	cmp	$-4095, %rax
	jae	failed
store:
	mov	64(%r12), %rcx
	test	%rcx, %rcx
	jz	next
	testb	$2, 72(%r12)
	jnz	narrow
	mov	%rax, (%rcx)
	jmp	next
narrow:
	mov	%eax, (%rcx)
next:
	add	$80, %r12
	dec	%r13
	jmp	stub
failed:
	testb	$1, 72(%r12)
	jnz	next
done:
	mov	$186, %eax
	syscall
	mov	%eax, %r14d
	mov	$39, %eax
	syscall
	mov	%eax, %edi
	mov	%r14d, %esi
	mov	%ebp, %edx
	mov	$234, %eax
	syscall
ended:
	jmp	*%rbx
copy:
	mov	8(%r12), %rcx
	testb	$8, 72(%r12)
	jnz	copy32
	mov	(%rcx), %rax
	jmp	store
copy32:
	mov	(%rcx), %eax
	jmp	store
