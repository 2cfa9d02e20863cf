// Package migrate is the handover: the state machines of source and destination,
// the messages between them, and what each writes to its journal before it goes
// on. It knows no transport, trap or checkpoint engine: appliance hands them in
// by the interfaces of engine.go, and tests drive it on fakes alone.
//
// The page pipelines are in migrate/stream.
package migrate
