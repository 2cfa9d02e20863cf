package appliance

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/checkpoint/inspect"
	"github.com/pageferry/pageferry/migrate"
)

// look inspects pid for a migration with opts. A program that runs changes while
// it is looked at, and may seem to have what it never had at one moment, such as
// an epoll set with a file that it has just closed: what is to be refused must be
// there time and again.
func look(pid int, opts SourceOptions) (rep *inspect.Report, err error) {
	const looks = 4
	for range looks {
		rep, err = lookOnce(pid, opts)
		if err != nil || rep.Movable {
			break
		}
	}
	return rep, err
}

func lookOnce(pid int, opts SourceOptions) (*inspect.Report, error) {
	rep, err := inspect.Inspect(pid, inspect.Options{TCPClose: opts.TCP == "close"})
	for _, wrong := range []error{inspect.ErrThread, inspect.ErrKernelThread, inspect.ErrZombie, inspect.ErrNoProcess} {
		if errors.Is(err, wrong) {
			return nil, &migrate.Refusal{Reasons: []string{fmt.Sprintf("%v", wrong)}}
		}
	}
	return rep, err
}

// inspection is a report in the API's form.
func inspection(rep *inspect.Report) Inspection {
	in := Inspection{
		PID: rep.PID, Comm: rep.Comm, Exe: rep.Exe, Threads: len(rep.Threads), MemoryBytes: rep.MemoryBytes,
		Parent: fmt.Sprintf("%s (pid %d)", rep.ParentComm, rep.ParentPID), Movable: rep.Movable,
	}
	if u := rep.Unit; u != nil {
		in.Unit, in.Restarts = u.Name, u.RestartsOnKill
	}
	for _, it := range rep.Items {
		in.Items = append(in.Items, InspectionItem{Kind: it.Kind, What: it.What, Carried: it.Carried, Reason: it.Reason})
	}
	return in
}
