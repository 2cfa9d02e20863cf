package inspect

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Text writes the report for people.
func (r *Report) Text(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "process %d (%s), %s, uid %d, %d threads, parent %d (%s)\n",
		r.PID, clean(r.Comm), r.State, r.UID, len(r.Threads), r.ParentPID, clean(r.ParentComm))
	fmt.Fprintf(&b, "  program   %s\n  directory %s\n  cgroup    %s\n", clean(r.Exe), clean(r.Cwd), clean(r.Cgroup))
	if u := r.Unit; u != nil {
		restart := ""
		if u.Restart != "" {
			restart = ", Restart=" + u.Restart
		}
		fmt.Fprintf(&b, "  unit      %s%s\n", clean(u.Name), restart)
	}
	fmt.Fprintf(&b, "\nmemory: %s mapped, %s resident, %s swapped, %s to copy\n",
		Bytes(r.Memory.TotalBytes), Bytes(r.Memory.ResidentBytes), Bytes(r.Memory.SwappedBytes), Bytes(r.MemoryBytes))
	t := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, k := range r.Memory.Kinds {
		fmt.Fprintf(t, "  %s\t%d mappings\t%s\t%s resident\n", k.Kind, k.Mappings, Bytes(k.TotalBytes), Bytes(k.ResidentBytes))
	}
	t.Flush()
	b.WriteByte('\n')
	t = tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, it := range r.Items {
		if it.Kind == "memory" {
			continue // the table above
		}
		verdict, more := "carried", it.Note
		if !it.Carried {
			verdict, more = "REFUSED", it.Reason
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\n", verdict, it.Kind, clean(it.What), clean(more))
	}
	t.Flush()
	if r.Movable {
		fmt.Fprintf(&b, "\nprocess %d can move.\n", r.PID)
	} else {
		fmt.Fprintf(&b, "\nprocess %d cannot move:\n", r.PID)
		for _, why := range r.Refusals() {
			fmt.Fprintf(&b, "  - %s\n", clean(why))
		}
	}
	for line := range bytes.Lines(b.Bytes()) {
		line = append(bytes.TrimRight(line, " \n"), '\n')
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return nil
}

// clean takes out of a name what a terminal would obey.
func clean(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 {
			return '?'
		}
		return c
	}, s)
}

// Bytes is a size for people, in binary units.
func Bytes(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
