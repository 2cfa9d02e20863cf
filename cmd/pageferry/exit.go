package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/cmd/pageferry/demo"
	"github.com/pageferry/pageferry/migrate"
)

// Exit statuses, the contract of the command line.
const (
	exitDone    = 0
	exitFailed  = 1 // and the source's process runs on
	exitUsage   = 2
	exitRefused = 3 // before anything was touched
	exitInDoubt = 4 // or lost; the message says what to do next
)

// statusError is an error whose exit status is known. said is set where the
// user has been told already.
type statusError struct {
	status int
	err    error
	said   bool
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &statusError{status: exitUsage, err: fmt.Errorf(format, args...)}
}

// exitStatus of what a command returned.
func exitStatus(err error) int {
	var se *statusError
	var api *appliance.APIError
	var usage *appliance.UsageError
	var refusal *migrate.Refusal
	var moved *demo.OutcomeError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &se):
		return se.status
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &refusal):
		return exitRefused
	case errors.As(err, &moved):
		return outcomeStatus(moved.Report.Outcome)
	case errors.Is(err, appliance.ErrDaemonGone):
		return exitInDoubt
	case errors.As(err, &api):
		switch api.Kind {
		case appliance.KindUsage, appliance.KindUnknown:
			return exitUsage
		case appliance.KindRefused:
			return exitRefused
		}
	}
	return exitFailed
}

// outcomeStatus is the exit status of a finished migration.
func outcomeStatus(o appliance.Outcome) int {
	switch o {
	case appliance.OutcomeDone:
		return exitDone
	case appliance.OutcomeRefused:
		return exitRefused
	case appliance.OutcomeInDoubt, appliance.OutcomeLost:
		return exitInDoubt
	}
	return exitFailed
}

// clean shortens errors that a user causes by Ctrl-C.
func clean(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted")
	}
	return err
}
