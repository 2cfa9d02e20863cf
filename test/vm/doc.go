// Package vm runs a command in a QEMU guest: another kernel than the host's,
// with soft-RoCE, soft-dirty bits and network emulation, for tests that need
// what the host lacks and for people who want to look at it.
//
// The guest sees the host's file system at the same paths, read-only under a
// layer in memory, so every program that is installed here runs there, and
// nothing that it writes is left. /tmp and /run are empty, but for the host's
// directories in /tmp that the job names. It is emulated in software (TCG): no
// KVM is needed, and only ratios of what is measured in it mean anything.
//
// [Prepare] fetches a Debian kernel by apt-get once and keeps its image and the
// modules in the user's cache directory; after that no network is needed. [Run]
// boots, in some 4 s, runs one command and waits for the guest to be gone.
//
// Host and guest speak over a virtio serial port (package link) with init, the
// guest's only own program, so output and exit status come back as they were,
// and the console's text is for error messages alone.
//
// Tests use package vmtest.
package vm
