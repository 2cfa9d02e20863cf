// Package sys is the kernel's raw interface: the structs, constants, ioctls and
// system calls that golang.org/x/sys/unix does not have, each under the header
// that it comes from. No other package issues raw system calls.
//
// Structs that cross into the kernel begin with structs.HostLayout and are named
// after the kernel's; a test compares their sizes. ioctl numbers are computed as
// <asm-generic/ioctl.h> does. Functions return bare errnos: the caller knows what
// it wanted and wraps. What may be missing on an older kernel returns
// *NotSupported, which names the kernel version that has it.
//
// The package holds no state and starts no goroutine. ptrace calls must be made
// on the thread that attached (see proc.Tracer).
package sys
