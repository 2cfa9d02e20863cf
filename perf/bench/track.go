package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/dirty"
)

const trackArg0 = "pageferry-bench-track"

// Tracked is a guest whose memory is tracked as in pre-copy, with nothing copied.
// A process of its own does it: who traces a child of its own and waits for its end
// may be told its stops there (wait4(2)).
type Tracked struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	outF  *os.File
	First Look
}

// Look is one look at a tracked process.
type Look struct {
	// Stop is how long it took to make the process open the tracker's descriptor,
	// for some of which it stood still; at the first look, which protects all memory.
	Stop    time.Duration `json:"stop"`
	Took    time.Duration `json:"took"`
	CPU     time.Duration `json:"cpu"`     // processor time of it
	Content uint64        `json:"content"` // bytes
	Dirty   uint64        `json:"dirty"`   // bytes
}

// PerGiB is how long it took for a GiB of content.
func (l Look) PerGiB() time.Duration { return l.perGiB(l.Took) }

func (l Look) perGiB(d time.Duration) time.Duration {
	return time.Duration(float64(d) * GiB / float64(max(1, l.Content)))
}

// Track begins to track g, which must not have moved. Close ends it and leaves the
// process as it was.
func (g *Guest) Track() (_ *Tracked, err error) {
	t := &Tracked{cmd: exec.Command("/proc/self/exe")}
	t.cmd.Args = []string{trackArg0, strconv.Itoa(g.prog.PID())}
	t.cmd.Stderr = os.Stderr
	if t.in, err = t.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	var w *os.File
	if t.outF, w, err = os.Pipe(); err != nil {
		return nil, err
	}
	t.cmd.Stdout, t.out = w, bufio.NewReader(t.outF)
	err = t.cmd.Start()
	w.Close()
	if err != nil {
		return nil, errors.Join(err, t.outF.Close())
	}
	if t.First, err = t.answer(); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *Tracked) answer() (l Look, err error) {
	_ = t.outF.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, err := t.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &l)
	}
	if err != nil {
		return l, fmt.Errorf("track: %w", err)
	}
	return l, nil
}

// Look looks what was written since the last time, as the rounds do.
func (t *Tracked) Look() (Look, error) {
	if _, err := io.WriteString(t.in, "look\n"); err != nil {
		return Look{}, fmt.Errorf("track: %w", err)
	}
	return t.answer()
}

// Close ends the tracking and waits for its process.
func (t *Tracked) Close() error {
	return errors.Join(t.in.Close(), t.cmd.Wait(), t.outF.Close())
}

// runTrack is the tracking process.
func runTrack(arg string) (err error) {
	pid, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	s, err := checkpoint.Open(pid, checkpoint.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Survey(); err != nil { // flags of mappings: before anything else, as a daemon does it
		return err
	}
	began := time.Now()
	f, err := s.Userfault(context.Background())
	if err != nil {
		return err
	}
	stop := time.Since(began)
	t, _, err := dirty.New(context.Background(), dirty.Config{PID: pid, Method: dirty.WPAsync,
		OpenUserfault: func(context.Context) (*os.File, error) { return f, nil }})
	if err != nil {
		return err
	}
	defer t.Close()
	enc := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); ; {
		began, used := time.Now(), processCPU()
		maps, err := s.Mappings()
		if err != nil {
			return err
		}
		p, err := t.Collect(maps)
		if err != nil {
			return err
		}
		l := Look{Stop: stop, Took: time.Since(began), CPU: processCPU() - used, Content: p.Content.Bytes(), Dirty: p.Written.Bytes()}
		if err := enc.Encode(l); err != nil {
			return err
		}
		if stop = 0; !in.Scan() {
			return nil
		}
	}
}
