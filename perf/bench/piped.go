package bench

import (
	"errors"
	"os"
	"os/exec"

	"github.com/pageferry/pageferry/appliance/lab"
)

// piped is this program in another role on a host, asked and answering by pipes.
type piped struct {
	in, out *os.File
	prog    *lab.Program
}

// startPiped starts it with what makes it take the role and what it is told. The
// stage ends it, if nobody does before.
func (s *Stage) startPiped(h *lab.Host, name, role, told string) (p piped, err error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return p, err
	}
	defer inR.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		inW.Close()
		return p, err
	}
	defer outW.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{role, told}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = inR, outW, os.Stderr
	prog, err := h.Start(name, cmd)
	if err != nil {
		return p, errors.Join(err, inW.Close(), outR.Close())
	}
	s.ends = append(s.ends, prog)
	return piped{inW, outR, prog}, nil
}
