// Package link is what host and guest say to each other over a virtio serial
// port: frames of one kind each, so that nothing that the kernel writes to the
// console gets between them.
//
// The host sends Start. The guest answers Started and then, in any order,
// Stdout and Stderr as they come, File for each file asked for, and Ended. Failed
// instead of Started or Ended says why there is no such thing.
package link
