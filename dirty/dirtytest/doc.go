// Package dirtytest is the suite that every tracker of package dirty passes, on a
// real process.
//
// [Program] is a program that changes its memory and its mappings as it is told.
// [Shadow] is a copy of its memory that is kept up to date by nothing but what a
// tracker tells: in the end it must equal the memory, byte for byte. A write that
// was not told is a page that differs. [Run] lets the program do all that programs
// do, in an order that its seed decides, while it writes.
package dirtytest
