// What word i of a table is: TABLE words are half a MiB. The build makes them as files.
#pragma once
#include <stdint.h>
#define TABLE (128u << 10)
#define CONTENT_AT(seed, i) (2654435761u * ((uint32_t)(i) + 1) + 977u * (seed))

// EMBED makes a file an array of the program's.
#define EMBED(name, file) \
	__asm__(".section .rodata\n.balign 4096\n" #name ":\n.incbin \"" file "\"\n.previous\n"); \
	extern const uint32_t name[TABLE] __attribute__((visibility("hidden")));
