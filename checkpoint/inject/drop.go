package inject

// Drop closes what the target holds on this side and leaves the process as it
// is: for one that has ended. The target cannot be used afterwards.
func (t *Target) Drop() error { return t.mem.Close() }
