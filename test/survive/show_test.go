package survive_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// slowly moves the guest so that its pages take seconds to arrive, and calls during
// when it runs at the other host.
func (g *guest) slowly(trap string, during func(n *node, id string)) appliance.Report {
	g.t.Helper()
	req := g.request("postcopy")
	req.Trap, req.MaxBandwidth = trap, "4MiB/s"
	return g.meanwhile(req, func(rep appliance.Report) bool { return rep.State == "serving" }, during)
}

// TestShown reads the memory of a process that is still arriving through the files
// that show it, and compares it with what the source has.
func TestShown(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	for _, trap := range []string{"auto", "uffd"} {
		g := r.small(t, r.a, "--mem", "64")
		home := g.at
		rep := g.slowly(trap, func(n *node, id string) {
			dir := "/run/pageferry/" + id
			if trap == "uffd" {
				if _, err := os.Stat(n.path(dir)); err == nil {
					t.Errorf("%s is there", dir)
				}
				return
			}
			compare(t, g, n, dir)
		})
		g.at, g.pid = r.other(home), rep.DestPID
		g.beat(2)
		if _, err := os.Stat(g.at.path("/run/pageferry/" + rep.ID)); err == nil {
			t.Errorf("%s: what showed it is there still", trap)
		}
		g.verify()
	}
	r.clean(t)
}

// compare reads small mappings of the guest by both of the files that show them.
func compare(t *testing.T, g *guest, n *node, dir string) {
	t.Helper()
	from := g.outer()
	maps, err := proc.ReadMaps(from)
	if err != nil {
		t.Error(err)
		return
	}
	var want []byte
	var byVMA, byMem []string
	count := 0
	for _, m := range maps {
		if strings.HasPrefix(m.Name, "[v") || m.Bytes() > 16<<10 || count == 4 {
			continue
		}
		b := make([]byte, m.Bytes())
		if err := readMem(from, m.Start, b); err != nil {
			t.Errorf("%v: %v", m, err)
			continue
		}
		count++
		want = append(want, b...)
		byVMA = append(byVMA, fmt.Sprintf("cat %s/vma/%x-%x", dir, uint64(m.Start), uint64(m.End)))
		byMem = append(byMem, fmt.Sprintf("dd if=%s/mem bs=4096 status=none skip=%d count=%d", dir, uint64(m.Start)>>page.Shift, m.Pages()))
	}
	if count < 3 {
		t.Errorf("%d mappings to compare", count)
	}
	for _, script := range [][]string{byVMA, byMem} {
		got, err := n.host.Run(t.Context(), "sh", "-ec", strings.Join(script, "\n"))
		if err != nil || string(got) != string(want) {
			t.Errorf("%s and so on: %v; %d bytes, not the %d of the source", script[0], err, len(got), len(want))
		}
	}
	for file, has := range map[string]string{"maps": "[stack]", "status": "PagesTotal"} {
		got, err := n.host.Run(t.Context(), "cat", dir+"/"+file)
		if err != nil || !strings.Contains(string(got), has) {
			t.Errorf("%s: %v, without %s:\n%s", file, err, has, got)
		}
	}
	if out, err := n.host.Run(t.Context(), "sh", "-c", "echo x > "+dir+"/mem"); err == nil {
		t.Errorf("it can be written to: %s", out)
	}
}

func readMem(pid int, at page.Addr, b []byte) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(b, int64(at))
	return err
}
