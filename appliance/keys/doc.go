// Package keys makes and loads what hosts prove their names with: an authority,
// a certificate and key for each host, and the TLS configurations that come of
// them.
//
// The authority is a directory that Init makes, with ca.pem and ca-key.pem; the
// key belongs on one machine and no host that migrates needs it. Issue makes
// NAME.pem and NAME-key.pem, both good for either end of a connection. Keys are
// ECDSA over P-256. No function overwrites a file: one that is there is somebody's.
//
// Whoever the authority has certified may connect, and may be connected to: the
// authority says which hosts move processes among each other, and an address
// given to migrate need not be a certified name. Where it matters that the other
// end is one certain host, Named demands it.
//
// Files are read again when they have changed, so certificates are renewed
// without a restart, by replacing both (issue into another directory and move
// them over). A pair that does not fit, as in the middle of a replacement,
// leaves the last good one in use.
package keys
