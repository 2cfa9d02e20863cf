// Package appliance is the daemon: the API on a unix socket, the listener for
// peers, admission, the registry of migrations, their journal and their reports.
// It is the only place that wires everything together; what touches processes
// comes in through Engine.
//
// Goroutines: Daemon.Run owns all of them and returns after they have. One
// serves the API, one accepts peers, one runs each migration. A migration
// outlives the API call that began it and ends with the daemon, without harm:
// before the commit the source's process runs on, after it both sides go on when
// the daemon is back, from what the journal says.
//
// Lock order: registry.mu, then migration.mu. Neither is held across I/O.
//
// Units: sizes in bytes, times as time.Duration, in JSON as the field's name
// says.
package appliance
