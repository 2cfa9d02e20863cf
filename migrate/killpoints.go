package migrate

import "slices"

// Kill points are the moments at which a daemon can die that make a difference:
// before and after every journal write, message sent and call of the engine,
// and after every message received. Config.KillPoint is called with their
// names, on the goroutine that is there; tests end the daemon in it.

// SourceKillPoints are the names that a Source passes.
func SourceKillPoints() []string {
	return killPoints("source/",
		[]string{"preparing", "committed", "serving", "resident", "aborted", "in-doubt", "lost", "remove"},
		[]string{"offer", "land", "state", "memory", "commit", "done", "abort", "resume"},
		[]string{"hello", "accept", "refuse", "landed", "ready", "running", "resident", "settled", "aborted", "resume-ack", "retry", "lost"},
		[]string{"open", "isolate", "track", "look", "throttle", "freeze", "scan", "hold", "before-commit", "at-switch", "reopen", "thaw", "source-exit", "kill"},
		"source/dial/before", "source/dial/after")
}

// DestinationKillPoints are those of a Destination.
func DestinationKillPoints() []string {
	return killPoints("destination/",
		[]string{"prepared", "ready", "committed", "running", "resident", "aborted", "lost", "remove"},
		[]string{"hello", "accept", "refuse", "landed", "ready", "running", "resident", "settled", "aborted", "resume-ack", "retry", "lost"},
		[]string{"hello", "offer", "land", "state", "memory", "commit", "done", "abort", "resume"},
		[]string{"prepare", "land", "rebuild", "release", "fetch", "resident", "epoch", "adopt", "finish", "abort"})
}

func killPoints(prefix string, records, sent, received, engine []string, more ...string) []string {
	out := slices.Clone(more)
	around := func(kind string, names []string) {
		for _, n := range names {
			out = append(out, prefix+kind+"/"+n+"/before", prefix+kind+"/"+n+"/after")
		}
	}
	around("journal", records)
	around("send", sent)
	around("engine", engine)
	for _, n := range received {
		out = append(out, prefix+"recv/"+n)
	}
	return out
}
