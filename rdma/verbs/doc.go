// Package verbs is the part of libibverbs that we need, in Go types. It is the
// only cgo of the project.
//
// The library is loaded by dlopen when the first device is opened, so that the
// same binary starts where it is missing: errors then wrap [ErrNoLibrary], as
// they do in a binary that was built without cgo. Functions that the library
// exports are called through pointers; those that <infiniband/verbs.h> defines
// inline (post, poll, arm) are compiled in, and jump into the device's provider.
//
// A call into C costs tens of nanoseconds, so work requests are posted and
// completions polled in batches, with the loop in C. Handles are addresses of C
// memory and cross the border as integers; no Go memory is kept by C, and only
// memory outside the Go heap may be registered.
//
// Objects are closed in the reverse order in which they were made: regions and
// queue pairs, then completion queues, then the device. Post, Poll and Arm of one
// object may be called by one goroutine at a time.
package verbs
