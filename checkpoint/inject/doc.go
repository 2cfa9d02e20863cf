// Package inject runs system calls inside a ptrace-stopped process, hundreds in
// one round trip, such that the tracer may die at any moment and the program
// goes on unharmed.
package inject
