// Package inject runs system calls inside a ptrace-stopped process, hundreds in
// one round trip, such that the tracer may die at any moment and the program
// goes on unharmed.
//
// # How
//
// A Target is an address space with a stub area mapped into it. A Batch is a
// table of system calls; Run writes it into the area and points a stopped thread
// at the stub, which works through the table and then sends its own thread a
// signal. The signal is one that the program ignores (SIGURG, SIGWINCH, SIGCHLD,
// ...): under ptrace it stops the thread nonetheless, and the tracer suppresses
// it. All others are blocked meanwhile.
//
// Behind the stub stands a resume trampoline for every thread. If no tracer is
// there any more the signal vanishes and the trampoline puts mask, flags and
// registers back. Extended processor state is never touched. The order of the
// ptrace requests is such that every moment between two of them is safe too:
//
//	begin   trampoline written, registers set to the stub, then signals blocked
//	release mask put back while still in the stub, then registers
//
// The first mmap is made from a small piece of code written into the zeros at
// the end of the vdso, and so is the last munmap: nothing executes a page that
// goes away under it.
//
// A call interrupted by the freeze goes on as the kernel would have it: Release
// leaves the kernel's own restart codes in the registers, so that a signal that
// arrived meanwhile is seen first.
//
// Other threads of the process go on when the tracer dies, and the batch beside them.
// Where that must not be, RunAlone puts them before a gate that only the end of the
// batch opens.
//
// A kept target (BootstrapKept) lasts over many stops. Its area says what it is, so that
// it is found when its owner has died (Left).
//
// # Threads and ownership
//
// Everything runs on the Tracer's thread; methods of one Target must not be
// called concurrently, except that RunAll itself drives many threads at once.
// The threads it is given must be ptrace-stopped in an event or signal stop, by
// the same Tracer. A Batch is used once. Its addresses are valid until it has
// run. Addresses and lengths are in bytes.
package inject
