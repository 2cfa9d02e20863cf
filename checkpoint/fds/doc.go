// Package fds captures the descriptor table of a frozen process and makes it
// anew in another one.
package fds
