// Package testutil is what every test of the project stands on. Only tests
// import it.
//
// The gate: [Require] is the only place that skips a test. Each skip is written
// to a ledger with its reason, and with PAGEFERRY_REQUIRE_ALL=1 (as `make test`
// sets it) a skip is a failure. [Main] prints the ledger; PAGEFERRY_LEDGER
// names a file to which the ledgers of all packages are appended.
//
// Leaks: [NoLeaks] compares processes, mounts, network namespaces, cgroups,
// descriptors, goroutines and temporary files before and after a test. Every
// process that a test binary starts carries a marker in its environment, which
// a migrated process keeps, so that it is found wherever it ends up. A guard
// process ends the marked processes if the test binary dies, whatever the way.
//
// Real programs: [Start], [Adopt], [Redis], [Memcached], [CC], [GoProgram],
// [StartEverything] and its relatives start, watch and end them, by pidfd and
// never by name. [Child] runs a test's body in a process with a time limit.
//
// The outside oracle: [Recorder] collects the heartbeats of a program and
// tells whether it ever had two owners.
//
// Functions that take a testing.TB fail it and do not return errors. All of
// them may be called from the goroutine of that test only, unless said so.
package testutil
