package image

// FileKind says which of OpenFile's parts is filled.
type FileKind uint8

const (
	FileRegular FileKind = iota + 1
	FileDirectory
	FileDevice // /dev/null zero random full urandom
	FilePipe   // one end of Image.Pipes[Pipe]
	FileFIFO   // named; one end of Image.Pipes[Pipe], whose Path is set
	FileEventFD
	FileEpoll
	FileTimerFD
	FileSignalFD
	FileInotify
	FileMemFD // Image.Memories[Memory]
	FileSocket
)

// OpenFile is an open file description (struct file of the kernel): what
// descriptors made by dup share.
type OpenFile struct {
	Kind    FileKind `cbor:"1,keyasint"`
	Flags   int      `cbor:"2,keyasint"` // open flags as F_GETFL, without O_CLOEXEC
	Pos     int64    `cbor:"3,keyasint"` // offset in bytes
	Path    string   `cbor:"4,keyasint"`
	Deleted bool     `cbor:"5,keyasint"`
	ID      FileID   `cbor:"6,keyasint"`
	Rdev    uint64   `cbor:"7,keyasint"`
	Locks   []Lock   `cbor:"8,keyasint"`
	Owner   *Owner   `cbor:"9,keyasint,omitempty"` // F_SETOWN, F_SETSIG
	// Content of a deleted regular file, when it is carried.
	Content []Chunk `cbor:"10,keyasint,omitempty"`

	Pipe     int         `cbor:"11,keyasint"` // index in Image.Pipes
	Memory   int         `cbor:"12,keyasint"` // index in Image.Memories
	EventFD  *EventFD    `cbor:"13,keyasint,omitempty"`
	Epoll    []EpollItem `cbor:"14,keyasint,omitempty"`
	TimerFD  *TimerFD    `cbor:"15,keyasint,omitempty"`
	SignalFD uint64      `cbor:"16,keyasint"` // mask
	Inotify  []Watch     `cbor:"17,keyasint,omitempty"`
	Socket   *Socket     `cbor:"18,keyasint,omitempty"`
	// UID and GID own the inode where it is made anew at the destination: a
	// pipe, a socket, a deleted file.
	UID uint32 `cbor:"19,keyasint"`
	GID uint32 `cbor:"20,keyasint"`
}

type Owner struct {
	Type   int `cbor:"1,keyasint"` // F_OWNER_*
	PID    int `cbor:"2,keyasint"`
	Signal int `cbor:"3,keyasint"`
}

// Lock is a flock, POSIX or open-file-description lock held through the file.
type Lock struct {
	Kind  string `cbor:"1,keyasint"` // "FLOCK", "POSIX", "OFDLCK" as in fdinfo
	Write bool   `cbor:"2,keyasint"`
	Start int64  `cbor:"3,keyasint"`
	Len   int64  `cbor:"4,keyasint"` // 0 is to the end
	FD    int    `cbor:"5,keyasint"` // descriptor to set it through
}

type EventFD struct {
	Count     uint64 `cbor:"1,keyasint"`
	Semaphore bool   `cbor:"2,keyasint"`
}

// EpollItem is one registration. Its key in the kernel is the number and the
// open file, so FD may since have been closed or reused: File is what counts.
type EpollItem struct {
	FD     int    `cbor:"1,keyasint"`
	File   int    `cbor:"2,keyasint"`
	Events uint32 `cbor:"3,keyasint"`
	Data   uint64 `cbor:"4,keyasint"`
}

type TimerFD struct {
	Clock      int    `cbor:"1,keyasint"`
	SetFlags   int    `cbor:"2,keyasint"`
	Ticks      uint64 `cbor:"3,keyasint"`
	ValueNS    int64  `cbor:"4,keyasint"` // left until it fires; 0 is disarmed
	IntervalNS int64  `cbor:"5,keyasint"`
}

type Watch struct {
	WD   int    `cbor:"1,keyasint"`
	Path string `cbor:"2,keyasint"`
	Mask uint32 `cbor:"3,keyasint"`
}

// Pipe is a pipe whose ends are both inside the image, or a FIFO.
type Pipe struct {
	Path     string   `cbor:"1,keyasint"` // of a FIFO
	Capacity int      `cbor:"2,keyasint"` // F_GETPIPE_SZ, bytes
	Data     []byte   `cbor:"3,keyasint"` // unread bytes
	Packets  [][]byte `cbor:"4,keyasint"` // of an O_DIRECT pipe, instead of Data
	// HangUp: the other end was open once and is gone, so that readers see the
	// end of file and writers EPIPE.
	HangUp bool `cbor:"5,keyasint"`
}

// SocketState is what a socket is doing.
type SocketState uint8

const (
	SocketFresh SocketState = iota + 1 // neither bound nor connected
	SocketBound                        // bound, not listening
	SocketListening
	SocketConnected // only where the peer is in the image (Peer), or a connected UDP socket
	SocketClosed    // was connected and is dead: reads give EOF or ECONNRESET
)

// Socket is an endpoint. Addresses are raw struct sockaddr bytes.
type Socket struct {
	Family   int         `cbor:"1,keyasint"`
	Type     int         `cbor:"2,keyasint"`
	Protocol int         `cbor:"3,keyasint"`
	State    SocketState `cbor:"4,keyasint"`
	Local    []byte      `cbor:"5,keyasint"`
	Remote   []byte      `cbor:"6,keyasint"`
	Backlog  int         `cbor:"7,keyasint"`
	Options  []SockOpt   `cbor:"8,keyasint"`
	Peer     int         `cbor:"9,keyasint"`  // index in Image.Files of a socketpair's other end, else -1
	Queue    [][]byte    `cbor:"10,keyasint"` // unread messages, one for a stream
	Shutdown int         `cbor:"11,keyasint"` // bit 0 no more receiving, bit 1 no more sending
	Mode     uint32      `cbor:"12,keyasint"` // of a unix socket's path
	UID      uint32      `cbor:"13,keyasint"`
	GID      uint32      `cbor:"14,keyasint"`
	// Reset: an established connection that --tcp close ends at the switch.
	Reset bool `cbor:"15,keyasint"`
}

type SockOpt struct {
	Level int    `cbor:"1,keyasint"`
	Name  int    `cbor:"2,keyasint"`
	Value []byte `cbor:"3,keyasint"`
}
