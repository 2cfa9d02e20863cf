// Package codec is what is done to the content of pages on their way: finding
// those that are all zero, and the CRC32C that each page carries from the read
// at the source to the placement at the destination.
//
// It is pure and safe for concurrent use: no state, no goroutines, no
// allocation. Content is handed in as whole pages, page.Size bytes each.
package codec
