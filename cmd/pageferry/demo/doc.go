// Package demo shows pageferry at work on one machine: two hosts (package
// appliance/lab), a daemon in each, a real redis-server with data, and clients
// that keep writing to it and check every answer while it moves from one host to
// the other and back.
//
// A client behaves as one behind Sentinel does: it knows both hosts' addresses
// and, when its connection breaks, tries them in turn until one takes it. Every
// key belongs to one client, which remembers the last value that was
// acknowledged; a write whose answer never came may or may not have been done,
// and both values are right until the next answer.
//
// Goroutines: one per client, and one that follows the migration; Run returns
// after all have ended. Times are the clients' own.
package demo
