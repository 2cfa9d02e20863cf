package fault

import (
	"errors"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// begin begins to stop the program. Who takes over then goes by the moves that were saved:
// those of an earlier time would be taken for what is under way now.
func (v *Veil) begin() error {
	if err := v.save(); err != nil {
		return err
	}
	v.src.SetStopping(true)
	return v.cfg.Freeze()
}

// standing deals with all events that there are, the program standing still.
func (v *Veil) standing() error {
	if err := v.begin(); err != nil {
		return err
	}
	return v.finish()
}

// held deals with the events that there are of the one process, whose userfaultfd is fd,
// while nobody returns to it from a call.
func (v *Veil) held(fd int) error {
	if err := v.begin(); err != nil {
		return err
	}
	for {
		d, err := v.look()
		if err != nil {
			return errors.Join(err, v.finish())
		}
		if len(d.pids) != 1 || !v.ahead(d) {
			return v.finish()
		}
		m, ok := v.read(fd, 0)
		if !ok {
			break
		}
		late := doing{pids: d.pids, changing: m.Event == sys.UffdEventUnmap || m.Event == sys.UffdEventRemap}
		if m.Event == sys.UffdEventRemove && !covers(d.givers, m) && !covers(d.keepers, m) {
			late.givers = []giver{{d.pids[0], addrs(m.Start, m.End)}} // it came after the look
			again, err := v.look()
			if err == nil && covers(again.keepers, m) && !covers(again.givers, m) {
				late.givers = nil
			}
		}
		if m.Event == sys.UffdEventFork || !v.ahead(late) {
			return v.finish() // with what was read
		}
		v.moves = nil
		v.src.ClearVeilEvents()
	}
	return v.letGo()
}

// letGo lets the program go on, when all that is known has been acted upon. In this order:
// who takes over must know it by then, for the program changes what it goes by; and
// nobody else would thaw it.
func (v *Veil) letGo() error {
	v.moves, v.followed = nil, nil
	err := v.save()
	v.src.ClearVeilEvents()
	err = errors.Join(err, v.cfg.Thaw())
	v.src.SetStopping(false)
	return err
}

// finish goes on where the program is being stopped.
func (v *Veil) finish() error {
	k := 0
	for _, _, ok := v.src.VeilEvent(k); ok && k < pagestore.MaxVeilEvents; _, _, ok = v.src.VeilEvent(k) {
		k++
	}
	for begin := time.Now(); ; {
		for _, fd := range v.src.VeilFDs() {
			for k < pagestore.MaxVeilEvents {
				if _, ok := v.read(fd, k); !ok {
					break
				}
				k++
			}
		}
		still, err := v.cfg.Frozen()
		if err != nil {
			return err
		}
		if still || k == pagestore.MaxVeilEvents {
			break
		}
		// Who waits for a page is not still before that is here.
		if v.stop.Load() {
			return nil // the next pager finds it as it is
		}
		time.Sleep(min(time.Since(begin)/4+20*time.Microsecond, 5*time.Millisecond))
	}
	return errors.Join(v.apply(), v.letGo())
}

// apply gives up what the events say. Nobody executes anything.
func (v *Veil) apply() error {
	spaces, err := v.spaces()
	if err != nil {
		return err
	}
	pids := make([]int, len(spaces))
	for i := range spaces {
		pids[i] = spaces[i][0]
	}
	v.forget(pids)
	var src page.Set // that is given up
	gone := map[int]*page.Set{}
	for _, pid := range pids {
		gone[pid] = new(page.Set)
	}
	for k := range pagestore.MaxVeilEvents {
		m, pid, ok := v.src.VeilEvent(k)
		if !ok {
			break
		}
		if m.Event != sys.UffdEventRemove || pid == nobody {
			continue
		}
		if gone[pid] == nil {
			if pid == 0 { // nobody must lose what another gave up
				v.log.Error("a program gave memory up in a way that does not tell which of several it was: it may find its old content there",
					"range", addrs(m.Start, m.End))
			}
			continue
		}
		gone[pid].Add(addrs(m.Start, m.End))
		from, _, lerr := v.cfg.Locate(pid, addrs(m.Start, m.End))
		err = errors.Join(err, lerr)
		for _, r := range from {
			src.Add(r)
		}
	}
	for _, pid := range pids {
		lost, lerr := v.lost(pid)
		err = errors.Join(err, lerr)
		src = page.Union(&src, &lost)
	}
	for _, pid := range pids {
		err = errors.Join(err, v.keep(pid, &src, gone[pid]))
	}
	return errors.Join(err, v.giveUp(src.Ranges()))
}

// keep gives pid copies of what it sees of src, but where it is gone, or its own.
func (v *Veil) keep(pid int, src, gone *page.Set) (err error) {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	for _, g := range s.sights {
		for _, r := range src.Intersect(g.src) {
			start := g.at.Start + (r.Start - g.src.Start)
			at := page.NewSet(page.Range{Start: start, End: start + page.Addr(r.Bytes())})
			at = page.Difference(&at, gone)
			at = page.Difference(&at, &s.own)
			for _, a := range at.Ranges() {
				err = errors.Join(err, v.cfg.Own(pid, a))
			}
		}
	}
	return err
}
