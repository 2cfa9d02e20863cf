package checkpoint

import (
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

const (
	rlimits     = 16 // RLIM_NLIMITS
	personaAsk  = 0xffffffff
	signals     = 64
	itimerCount = 3
)

func addr(a uint64) page.Addr { return page.Addr(a) }

// outside reads what /proc says of the process.
func (c *capture) outside() (err error) {
	s, p := c.s, c.p
	host, err := ThisHost()
	if err != nil {
		return err
	}
	c.img.Host = host
	if c.status, err = proc.ReadStatus(s.pid); err != nil {
		return err
	}
	st := c.status
	if st.Seccomp != 0 {
		return &RefusedError{s.pid, []string{"it has a seccomp filter"}}
	}
	stat, err := proc.ReadStat(s.pid)
	if err != nil {
		return err
	}
	p.HostPID, p.PID = s.pid, innermost(st.NSTGID, s.pid)
	p.PPID = st.PPID
	p.PGID, p.SID = innermost(st.NSPGID, stat.PGID), innermost(st.NSSID, stat.SID)
	p.MM = image.MM{
		StartCode: stat.StartCode, EndCode: stat.EndCode, StartData: stat.StartData, EndData: stat.EndData,
		StartBrk: stat.StartBrk, StartStack: stat.StartStack,
		ArgStart: stat.ArgStart, ArgEnd: stat.ArgEnd, EnvStart: stat.EnvStart, EnvEnd: stat.EnvEnd,
	}
	p.Umask = st.Umask
	p.Stopped = s.stopped
	p.Creds = image.Creds{
		UID: st.UID, GID: st.GID, Groups: st.Groups, CapInh: st.CapInh, CapPrm: st.CapPrm,
		CapEff: st.CapEff, CapBnd: st.CapBnd, CapAmb: st.CapAmb, NoNewPrivs: st.NoNewPrivs,
	}
	if p.Auxv, err = proc.Auxv(s.pid); err != nil {
		return err
	}
	for _, l := range []struct {
		name string
		to   *string
	}{{"exe", &p.Exe}, {"cwd", &p.Cwd}, {"root", &p.Root}} {
		if *l.to, err = proc.Link(s.pid, l.name); err != nil {
			return err
		}
	}
	oom, err := proc.Int(s.pid, "oom_score_adj")
	if err != nil {
		return err
	}
	p.OOMScoreAdj = int(oom)
	if s.hasGroup {
		path, _, err := proc.CgroupV2(s.pid)
		if err != nil {
			return err
		}
		if s.isolated {
			path = strings.TrimSuffix(path, "/"+s.groupName())
			if path == "" {
				path = "/"
			}
		}
		p.Cgroup = path
	}
	if c.timers, err = proc.ReadTimers(s.pid); err != nil {
		return err
	}
	return c.vdso()
}

// innermost is the last of a list of ids, one for each pid namespace.
func innermost(ids []int, otherwise int) int {
	if len(ids) == 0 {
		return otherwise
	}
	return ids[len(ids)-1]
}

func (c *capture) vdso() error {
	for i := range c.maps {
		m := &c.maps[i]
		if m.Name != "[vdso]" {
			continue
		}
		c.p.VDSO = make([]byte, m.Bytes())
		if err := c.s.mem.Load().ReadAt(c.p.VDSO, m.Start); err != nil {
			return err
		}
		inject.CleanVDSO(c.p.VDSO)
	}
	return nil
}

// processBatch begins the main thread's batch with what it can tell of the whole
// process.
func (c *capture) processBatch(t *inject.Target) (*inject.Batch, func() error) {
	b := t.Batch()
	p := c.p
	actions := make([]*inject.Out, signals+1)
	actionSize := sys.SizeOf[sys.KernelSigaction]()
	for sig := 1; sig <= signals; sig++ {
		if sig == int(unix.SIGKILL) || sig == int(unix.SIGSTOP) {
			continue
		}
		actions[sig] = b.Space(actionSize)
		b.Call(unix.SYS_RT_SIGACTION, uint64(sig), 0, actions[sig].Addr(), 8)
	}
	var itimers [itimerCount]*inject.Out
	for i := range itimers {
		itimers[i] = b.Space(sys.SizeOf[sys.Itimerval]())
		b.Call(unix.SYS_GETITIMER, uint64(i), itimers[i].Addr())
	}
	type timer struct {
		value   *inject.Out
		overrun *inject.Call
	}
	timers := make([]timer, len(c.timers))
	for i, pt := range c.timers {
		timers[i].value = b.Space(sys.SizeOf[sys.Itimerspec]())
		b.Call(unix.SYS_TIMER_GETTIME, uint64(pt.ID), timers[i].value.Addr())
		timers[i].overrun = b.Call(unix.SYS_TIMER_GETOVERRUN, uint64(pt.ID)).Optional()
	}
	var limits [rlimits]*inject.Out
	for i := range limits {
		limits[i] = b.Space(16)
		b.Call(unix.SYS_PRLIMIT64, 0, uint64(i), 0, limits[i].Addr())
	}
	dumpable := b.Call(unix.SYS_PRCTL, unix.PR_GET_DUMPABLE)
	thp := b.Call(unix.SYS_PRCTL, unix.PR_GET_THP_DISABLE).Optional()
	reaper := b.Space(4)
	b.Call(unix.SYS_PRCTL, unix.PR_GET_CHILD_SUBREAPER, reaper.Addr())
	deathsig := b.Space(4)
	b.Call(unix.SYS_PRCTL, unix.PR_GET_PDEATHSIG, deathsig.Addr())
	secure := b.Call(unix.SYS_PRCTL, unix.PR_GET_SECUREBITS)
	persona := b.Call(unix.SYS_PERSONALITY, personaAsk)
	brk := b.Call(unix.SYS_BRK, 0)
	mono, boot := b.Space(16), b.Space(16)
	b.Call(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, mono.Addr())
	b.Call(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME, boot.Addr())

	return b, func() error {
		le := binary.LittleEndian
		for sig, o := range actions {
			if o == nil {
				continue
			}
			if a, _ := sys.FromBytes[sys.KernelSigaction](o.Bytes()); a.Handler != sys.SigDfl || a.Flags != 0 || a.Mask != 0 {
				p.SigActions = append(p.SigActions, image.SigAction{
					Signal: sig, Handler: a.Handler, Flags: a.Flags, Restorer: a.Restorer, Mask: a.Mask,
				})
			}
		}
		for i, o := range itimers {
			v, _ := sys.FromBytes[sys.Itimerval](o.Bytes())
			p.ITimers[i] = itimer(v)
		}
		// A real-time one that has fired and whose signal has not been taken yet
		// reads as 0 with an interval: the kernel arms it at the delivery.
		if real := &p.ITimers[unix.ITIMER_REAL]; real.ValueUS == 0 {
			real.ValueUS = real.IntervalUS
		}
		for i, pt := range c.timers {
			v, _ := sys.FromBytes[sys.Itimerspec](timers[i].value.Bytes())
			overrun, _ := timers[i].overrun.Ret()
			x, err := c.posixTimer(pt, v, int(overrun))
			if err != nil {
				return err
			}
			p.PosixTimers = append(p.PosixTimers, x)
		}
		for i, o := range limits {
			p.Rlimits = append(p.Rlimits, image.Rlimit{Resource: i, Cur: le.Uint64(o.Bytes()), Max: le.Uint64(o.Bytes()[8:])})
		}
		v, _ := dumpable.Ret()
		p.Dumpable = int(v)
		v, _ = thp.Ret()
		p.THPDisable = v == 1
		p.ChildSubreaper = le.Uint32(reaper.Bytes()) != 0
		p.PDeathSig = int(le.Uint32(deathsig.Bytes()))
		v, _ = secure.Ret()
		p.Creds.SecureBits = uint32(v)
		v, _ = persona.Ret()
		p.Personality = uint32(v)
		p.MM.Brk, _ = brk.Ret()
		c.img.Monotonic, c.img.Boottime = clock(mono.Bytes()), clock(boot.Bytes())
		return nil
	}
}

func clock(b []byte) time.Duration {
	le := binary.LittleEndian
	return time.Duration(le.Uint64(b))*time.Second + time.Duration(le.Uint64(b[8:]))
}

func itimer(v sys.Itimerval) image.ITimer {
	const us = 1_000_000
	t := image.ITimer{IntervalUS: uint64(v.IntervalSec*us + v.IntervalUS), ValueUS: uint64(v.ValueSec*us + v.ValueUS)}
	return t
}

func (c *capture) posixTimer(pt proc.Timer, v sys.Itimerspec, overrun int) (image.PosixTimer, error) {
	x := image.PosixTimer{
		ID: pt.ID, Clock: int32(pt.Clock), Signal: int32(pt.Signal), Value: pt.Value, Overrun: overrun,
		IntervalNS: v.Interval.Sec*int64(time.Second) + v.Interval.Nsec,
		ValueNS:    v.Value.Sec*int64(time.Second) + v.Value.Nsec,
	}
	switch pt.Notify {
	case "signal":
		x.Notify = sys.SigevSignal
	case "none":
		x.Notify = sys.SigevNone
	case "thread":
		x.Notify = sys.SigevThread
	}
	if pt.Thread {
		x.Notify |= sys.SigevThreadID
		for i := range c.p.Threads {
			if c.p.Threads[i].HostTID == pt.PID {
				x.NotifyTID = c.p.Threads[i].TID
			}
		}
		if x.NotifyTID == 0 {
			return x, fmt.Errorf("timer %d notifies thread %d, which is not there", pt.ID, pt.PID)
		}
	}
	return x, nil
}
