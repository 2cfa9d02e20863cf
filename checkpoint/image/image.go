package image

import (
	"time"

	"github.com/pageferry/pageferry/page"
)

// Image is the state of one or more processes at one moment.
type Image struct {
	Created   time.Time      `cbor:"1,keyasint"`
	Host      Host           `cbor:"2,keyasint"`
	Root      int            `cbor:"3,keyasint"` // index in Processes of the one that was asked for
	Processes []Process      `cbor:"4,keyasint"`
	Files     []OpenFile     `cbor:"5,keyasint"` // open file descriptions; descriptors name them by index
	Pipes     []Pipe         `cbor:"6,keyasint"`
	Memories  []SharedMemory `cbor:"7,keyasint"`
	// Clocks of the source at the freeze. The destination offsets a time
	// namespace so that monotonic time goes on from here.
	Monotonic time.Duration `cbor:"8,keyasint"`
	Boottime  time.Duration `cbor:"9,keyasint"`
	// MappedFiles are the regular files that processes have mapped privately, and
	// their executables: page.FirstFileSpace+i is the space of file i.
	MappedFiles []MappedFile `cbor:"10,keyasint,omitempty"`
}

// MappedFile is a file that the source can give the content of.
type MappedFile struct {
	Path string `cbor:"1,keyasint"` // as in maps, without " (deleted)"
	File FileID `cbor:"2,keyasint"`
	// Deleted: nothing leads to it any more. Its private mappings are carried as
	// anonymous memory, and no VMA names it.
	Deleted bool `cbor:"3,keyasint"`
}

// Host is what a destination must offer to take the process.
type Host struct {
	Kernel    string `cbor:"1,keyasint"` // uname -r
	Machine   string `cbor:"2,keyasint"` // uname -m
	XFeatures uint64 `cbor:"3,keyasint"` // XCR0 as found in the XSTATE header area
	XSize     uint32 `cbor:"4,keyasint"` // bytes of one thread's XSTATE
	Node      string `cbor:"5,keyasint"`
}

// Process is one process with all its threads.
type Process struct {
	PID  int `cbor:"1,keyasint"` // in its innermost pid namespace
	PPID int `cbor:"2,keyasint"`
	PGID int `cbor:"3,keyasint"`
	SID  int `cbor:"4,keyasint"`
	// HostPID was its pid as the source's daemon saw it. It names the process
	// to people and in journals and has no meaning at the destination.
	HostPID int `cbor:"5,keyasint"`

	Threads []Thread `cbor:"6,keyasint"` // the leader first
	VMAs    []VMA    `cbor:"7,keyasint"` // ascending
	MM      MM       `cbor:"8,keyasint"`
	Auxv    []byte   `cbor:"9,keyasint"`
	VDSO    []byte   `cbor:"10,keyasint"` // the source's vdso, to bridge to another one

	SigActions  []SigAction  `cbor:"11,keyasint"` // those that differ from SIG_DFL
	Pending     [][]byte     `cbor:"12,keyasint"` // shared pending signals: siginfo_t, 128 bytes each
	ITimers     [3]ITimer    `cbor:"13,keyasint"` // REAL, VIRTUAL, PROF
	PosixTimers []PosixTimer `cbor:"14,keyasint"`
	Rlimits     []Rlimit     `cbor:"15,keyasint"` // by resource number

	Exe   string `cbor:"16,keyasint"`
	Cwd   string `cbor:"17,keyasint"`
	Root  string `cbor:"18,keyasint"`
	Umask uint32 `cbor:"19,keyasint"`
	Creds Creds  `cbor:"20,keyasint"`

	OOMScoreAdj    int    `cbor:"21,keyasint"`
	Dumpable       int    `cbor:"22,keyasint"`
	THPDisable     bool   `cbor:"23,keyasint"`
	ChildSubreaper bool   `cbor:"24,keyasint"`
	Stopped        bool   `cbor:"25,keyasint"` // SIGSTOPped before the freeze, and to be so after
	Personality    uint32 `cbor:"26,keyasint"`
	PDeathSig      int    `cbor:"27,keyasint"`
	Cgroup         string `cbor:"28,keyasint"` // v2 path, for information

	FDs []FD `cbor:"29,keyasint"` // ascending
	// ExeFile is the index in Image.MappedFiles of the executable, plus 1; 0 for none.
	ExeFile int `cbor:"30,keyasint,omitempty"`
}

// Thread is one thread of a process.
type Thread struct {
	TID      int       `cbor:"1,keyasint"` // in the innermost pid namespace
	HostTID  int       `cbor:"2,keyasint"`
	Regs     Regs      `cbor:"3,keyasint"` // ready to run: interrupted calls are already set to restart
	XState   []byte    `cbor:"4,keyasint"` // XSAVE standard form (PTRACE_GETREGSET NT_X86_XSTATE)
	SigMask  uint64    `cbor:"5,keyasint"`
	Pending  [][]byte  `cbor:"6,keyasint"` // siginfo_t, 128 bytes each
	Robust   uint64    `cbor:"7,keyasint"`
	RobustSz uint64    `cbor:"8,keyasint"`
	ClearTID uint64    `cbor:"9,keyasint"`
	AltStack AltStack  `cbor:"10,keyasint"`
	Rseq     Rseq      `cbor:"11,keyasint"`
	Comm     string    `cbor:"12,keyasint"`
	Sched    Sched     `cbor:"13,keyasint"`
	Affinity []uint64  `cbor:"14,keyasint"` // cpu_set_t words
	IOPrio   int       `cbor:"15,keyasint"`
	TimerSlk uint64    `cbor:"16,keyasint"`
	RestartB *RestartB `cbor:"17,keyasint,omitempty"`
}

// RestartB remembers that the thread was interrupted in a call that the kernel
// restarts with restart_syscall (ERESTART_RESTARTBLOCK). The source goes on by
// restart_syscall; the destination has no restart block and repeats the call.
// Thread.Regs holds the destination's form.
type RestartB struct {
	SyscallNr uint64 `cbor:"1,keyasint"`
}

// Regs is struct user_regs_struct of x86-64, in its order.
type Regs struct {
	R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8   uint64
	RAX, RCX, RDX, RSI, RDI, OrigRAX, RIP, CS, Flags uint64
	RSP, SS, FSBase, GSBase, DS, ES, FS, GS          uint64
	_                                                struct{} `cbor:",toarray"`
}

type AltStack struct {
	SP    uint64 `cbor:"1,keyasint"`
	Flags int32  `cbor:"2,keyasint"`
	Size  uint64 `cbor:"3,keyasint"`
}

// Rseq is struct ptrace_rseq_configuration; Ptr 0 means not registered.
type Rseq struct {
	Ptr  uint64 `cbor:"1,keyasint"`
	Size uint32 `cbor:"2,keyasint"`
	Sig  uint32 `cbor:"3,keyasint"`
}

// Sched is what sched_getattr says.
type Sched struct {
	Policy   uint32 `cbor:"1,keyasint"`
	Flags    uint64 `cbor:"2,keyasint"`
	Nice     int32  `cbor:"3,keyasint"`
	Priority uint32 `cbor:"4,keyasint"`
	Runtime  uint64 `cbor:"5,keyasint"`
	Deadline uint64 `cbor:"6,keyasint"`
	Period   uint64 `cbor:"7,keyasint"`
}

// SigAction is struct kernel_sigaction of x86-64.
type SigAction struct {
	Signal   int    `cbor:"1,keyasint"`
	Handler  uint64 `cbor:"2,keyasint"`
	Flags    uint64 `cbor:"3,keyasint"`
	Restorer uint64 `cbor:"4,keyasint"`
	Mask     uint64 `cbor:"5,keyasint"`
}

// ITimer is struct itimerval, in microseconds.
type ITimer struct {
	IntervalUS uint64 `cbor:"1,keyasint"`
	ValueUS    uint64 `cbor:"2,keyasint"`
}

// PosixTimer is one timer_create timer. Times in nanoseconds.
type PosixTimer struct {
	ID         int    `cbor:"1,keyasint"`
	Clock      int32  `cbor:"2,keyasint"`
	Notify     int32  `cbor:"3,keyasint"` // SIGEV_*
	Signal     int32  `cbor:"4,keyasint"`
	Value      uint64 `cbor:"5,keyasint"` // sigev_value
	NotifyTID  int    `cbor:"6,keyasint"`
	IntervalNS int64  `cbor:"7,keyasint"`
	ValueNS    int64  `cbor:"8,keyasint"` // left until it fires; 0 is disarmed
	Overrun    int    `cbor:"9,keyasint"`
}

type Rlimit struct {
	Resource int    `cbor:"1,keyasint"`
	Cur      uint64 `cbor:"2,keyasint"`
	Max      uint64 `cbor:"3,keyasint"`
}

// Creds of the whole process; threads that differ are refused.
type Creds struct {
	UID        [4]uint32 `cbor:"1,keyasint"` // real, effective, saved, fs
	GID        [4]uint32 `cbor:"2,keyasint"`
	Groups     []uint32  `cbor:"3,keyasint"`
	CapInh     uint64    `cbor:"4,keyasint"`
	CapPrm     uint64    `cbor:"5,keyasint"`
	CapEff     uint64    `cbor:"6,keyasint"`
	CapBnd     uint64    `cbor:"7,keyasint"`
	CapAmb     uint64    `cbor:"8,keyasint"`
	SecureBits uint32    `cbor:"9,keyasint"`
	NoNewPrivs bool      `cbor:"10,keyasint"`
}

// MM is struct prctl_mm_map without its pointers.
type MM struct {
	StartCode  uint64 `cbor:"1,keyasint"`
	EndCode    uint64 `cbor:"2,keyasint"`
	StartData  uint64 `cbor:"3,keyasint"`
	EndData    uint64 `cbor:"4,keyasint"`
	StartBrk   uint64 `cbor:"5,keyasint"`
	Brk        uint64 `cbor:"6,keyasint"`
	StartStack uint64 `cbor:"7,keyasint"`
	ArgStart   uint64 `cbor:"8,keyasint"`
	ArgEnd     uint64 `cbor:"9,keyasint"`
	EnvStart   uint64 `cbor:"10,keyasint"`
	EnvEnd     uint64 `cbor:"11,keyasint"`
}

// VMAKind says where the content of a mapping comes from.
type VMAKind uint8

const (
	VMAAnon       VMAKind = iota + 1 // private anonymous: heap, stacks, allocator arenas
	VMAFile                          // private mapping of a regular file
	VMAFileShared                    // shared mapping of a regular file
	VMAShared                        // shared memory object: MAP_SHARED|MAP_ANONYMOUS, memfd; see Memory
	VMAVDSO
	VMAVVAR     // [vvar] and [vvar_vclock], told apart by Path
	VMAVsyscall // not ours to map
	VMADevice   // private or shared mapping of /dev/zero
)

// VMA is one mapping. Prot is PROT_*. Flags are the two-letter codes of VmFlags
// in /proc/PID/smaps.
type VMA struct {
	page.Range
	Kind    VMAKind  `cbor:"3,keyasint"`
	Prot    int      `cbor:"4,keyasint"`
	Shared  bool     `cbor:"5,keyasint"`
	Offset  uint64   `cbor:"6,keyasint"` // bytes into the file or object
	Path    string   `cbor:"7,keyasint"` // as in maps, without " (deleted)"
	Deleted bool     `cbor:"8,keyasint"`
	File    FileID   `cbor:"9,keyasint"`
	Memory  int      `cbor:"10,keyasint"` // index in Image.Memories for VMAShared, else -1
	Flags   []string `cbor:"11,keyasint"`
	Name    string   `cbor:"12,keyasint"` // PR_SET_VMA_ANON_NAME
	// Window: no mapping of the process, but one of the kind VMAShared that is there
	// until it runs. It shows all of an object, for what no other mapping does.
	Window bool `cbor:"13,keyasint"`
	// MappedFile is the index in Image.MappedFiles for VMAFile, plus 1; 0 for none, as
	// in images that know of no such files.
	MappedFile int `cbor:"14,keyasint,omitempty"`
}

// Has reports whether VmFlags had the two-letter code.
func (v *VMA) Has(flag string) bool {
	for _, f := range v.Flags {
		if f == flag {
			return true
		}
	}
	return false
}

// FileID identifies the file behind a path so that a destination can tell
// whether it has the same one.
type FileID struct {
	Dev     uint64 `cbor:"1,keyasint"`
	Ino     uint64 `cbor:"2,keyasint"`
	Size    int64  `cbor:"3,keyasint"`
	MTimeNS int64  `cbor:"4,keyasint"`
	Mode    uint32 `cbor:"5,keyasint"`
	BuildID string `cbor:"6,keyasint"` // hex, of an ELF file, else empty
	// Hash is the SHA-256 of its content in hex, of a file that is mapped privately and
	// has no build id. Empty: not known.
	Hash string `cbor:"7,keyasint,omitempty"`
}

// SharedMemory is one shared memory object of the image. Its content is carried
// through its mappings and a window, or by Chunks where it is small.
type SharedMemory struct {
	Memfd bool   `cbor:"1,keyasint"` // else MAP_SHARED|MAP_ANONYMOUS
	Name  string `cbor:"2,keyasint"`
	Size  int64  `cbor:"3,keyasint"`
	Seals int    `cbor:"4,keyasint"`
	Huge  uint32 `cbor:"5,keyasint"`
	// Chunks is the whole content; holes are left out. Only for objects no
	// larger than MaxInlineMemory; larger ones are in the page stream.
	Chunks []Chunk `cbor:"6,keyasint"`
	// ID tells it from others of the same source, before the image and in it.
	ID ObjectID `cbor:"7,keyasint"`
}

// ObjectID is what the source's kernel calls an object of shared memory. The zero
// value is none.
type ObjectID struct {
	Dev uint64 `cbor:"1,keyasint"`
	Ino uint64 `cbor:"2,keyasint"`
}

// Chunk is content at an offset in bytes.
type Chunk struct {
	Offset int64  `cbor:"1,keyasint"`
	Data   []byte `cbor:"2,keyasint"`
}

// FD is one entry of a descriptor table.
type FD struct {
	Num         int  `cbor:"1,keyasint"`
	CloseOnExec bool `cbor:"2,keyasint"`
	File        int  `cbor:"3,keyasint"` // index in Image.Files
}
