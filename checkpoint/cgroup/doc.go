// Package cgroup makes, fills, freezes and removes groups of the cgroup v2 tree.
//
// Freezing is what holds a process whatever dies: a frozen task executes nothing,
// not after SIGCONT and not when its tracer ends. A process is moved into a child
// of its own group, so that the limits set for it and the place where systemd
// looks for it stay.
//
// The package keeps no state beyond paths and starts no goroutine. On hosts with
// both versions the v2 tree is found where it is mounted, and in a cgroup
// namespace paths are what the caller sees.
package cgroup
