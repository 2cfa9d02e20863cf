package restore

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// From <linux/securebits.h>.
const (
	secbitNoSetuidFixup = 1 << 2
	secbitKeepCaps      = 1 << 4
)

// sameCreds reports whether there is nothing to do.
func sameCreds(a, b *image.Creds) bool {
	return a.UID == b.UID && a.GID == b.GID && slices.Equal(a.Groups, b.Groups) &&
		a.CapInh == b.CapInh && a.CapPrm == b.CapPrm && a.CapEff == b.CapEff && a.CapBnd == b.CapBnd && a.CapAmb == b.CapAmb &&
		a.SecureBits == b.SecureBits && a.NoNewPrivs == b.NoNewPrivs
}

// credentials sets those of the calling thread, for each has its own; own are
// the seed's, which it has now. Until the last call it keeps every capability,
// whatever its user ids; nothing after it can count on any.
//
// The order is that of what each step needs: bounds are dropped and ids changed
// with CAP_SETPCAP, CAP_SETGID and CAP_SETUID still there; ambient capabilities
// are raised while the permitted ones are full, as the seed had them, for a
// secure bit may forbid it afterwards; the real sets come last.
func credentials(s *script, p *image.Process, lastCap int, own *image.Creds) {
	c := &p.Creds
	if sameCreds(c, own) {
		return
	}
	full := own.CapPrm
	s.onf("secure bits")
	s.call(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, secbitNoSetuidFixup|secbitKeepCaps, 0, 0, 0)
	for n := range lastCap + 1 {
		if c.CapBnd>>n&1 == 0 {
			s.on(func() string { return "capability bounding set" })
			s.call(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uint64(n), 0, 0, 0)
		}
	}
	s.onf("groups")
	var groups uint64
	if len(c.Groups) > 0 {
		b := make([]byte, 0, 4*len(c.Groups))
		for _, g := range c.Groups {
			b = binary.LittleEndian.AppendUint32(b, g)
		}
		groups = s.Bytes(b)
	}
	s.call(unix.SYS_SETGROUPS, uint64(len(c.Groups)), groups)
	s.onf("group ids %v", c.GID)
	s.call(unix.SYS_SETRESGID, uint64(c.GID[0]), uint64(c.GID[1]), uint64(c.GID[2]))
	s.call(unix.SYS_SETFSGID, uint64(c.GID[3]))
	s.onf("user ids %v", c.UID)
	s.call(unix.SYS_SETRESUID, uint64(c.UID[0]), uint64(c.UID[1]), uint64(c.UID[2]))
	s.call(unix.SYS_SETFSUID, uint64(c.UID[3]))

	s.onf("capabilities")
	capset(s, full, full, c.CapInh|c.CapAmb)
	s.call(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for n := range lastCap + 1 {
		if c.CapAmb>>n&1 == 1 {
			s.call(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uint64(n), 0, 0)
		}
	}
	s.onf("secure bits %#x", c.SecureBits)
	s.call(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, uint64(c.SecureBits), 0, 0, 0)
	s.onf("capabilities")
	capset(s, c.CapEff, c.CapPrm, c.CapInh)
	if c.NoNewPrivs {
		s.onf("no_new_privs")
		s.call(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
}

func capset(s *script, eff, prm, inh uint64) {
	hdr := put(s, &sys.CapHeader{Version: sys.CapVersion3})
	lo := sys.CapData{Effective: uint32(eff), Permitted: uint32(prm), Inheritable: uint32(inh)}
	hi := sys.CapData{Effective: uint32(eff >> 32), Permitted: uint32(prm >> 32), Inheritable: uint32(inh >> 32)}
	data := s.Bytes(append(append([]byte(nil), sys.AsBytes(&lo)...), sys.AsBytes(&hi)...))
	s.call(unix.SYS_CAPSET, hdr, data)
}

// afterCredentials is what a change of credentials resets, per process.
func afterCredentials(s *script, p *image.Process) {
	// 2 is what the kernel sets of itself where fs.suid_dumpable says so; a
	// process can only ask for 0 and 1, and 0 shows no more than 2 does.
	s.onf("dumpable %d", p.Dumpable)
	d := uint64(0)
	if p.Dumpable == 1 {
		d = 1
	}
	s.call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, d, 0, 0, 0)
}
