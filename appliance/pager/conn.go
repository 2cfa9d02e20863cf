package pager

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"
)

// maxPacket bounds a packet of the control connection, in bytes. What is larger
// travels in a memfd.
const maxPacket = 32 << 10

// op says what a packet is.
type op string

const (
	opHello        op = "hello" // the first of a new pager's life: settings
	opWho          op = "who"   // the first of every other connection
	opLane         op = "lane"
	opEpoch        op = "epoch"
	opFile         op = "file"
	opLand         op = "land"
	opAdopt        op = "adopt"
	opFetch        op = "fetch"
	opWaitEager    op = "wait-eager"
	opWaitResident op = "wait-resident"
	opStats        op = "stats"
	opPoison       op = "poison"
	opFinish       op = "finish"
	opFree         op = "free"
	opShow         op = "show"
	opVeiled       op = "veiled"
	opUnveil       op = "unveil"
	opReplaced     op = "replaced"
	opRead         op = "read"
	opHold         op = "hold"
	opShown        op = "shown"
	opReply        op = "reply"
	opEvent        op = "event"
)

// packet is one SEQPACKET message. A request has an ID, which comes back in its
// reply; an event has none.
type packet struct {
	ID   uint64          `cbor:"1,keyasint,omitempty"`
	Op   op              `cbor:"2,keyasint"`
	Body cbor.RawMessage `cbor:"3,keyasint,omitempty"`
	// Err is why a request failed, and Code the sentinel that it is.
	Err  string `cbor:"4,keyasint,omitempty"`
	Code string `cbor:"5,keyasint,omitempty"`
	// Large: the first descriptor is a memfd that holds the body.
	Large bool `cbor:"6,keyasint,omitempty"`
}

// conn is a control connection. send is safe for concurrent use.
type conn struct {
	c   *net.UnixConn
	mu  sync.Mutex
	buf []byte // the receiver's
	oob []byte
}

const maxFDs = 8

func newConn(c *net.UnixConn) *conn {
	return &conn{c: c, buf: make([]byte, maxPacket), oob: make([]byte, unix.CmsgSpace(maxFDs*4))}
}

// fileConn takes ownership of f.
func fileConn(f *os.File) (*conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("pager: control connection: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("pager: control connection is not a unix socket")
	}
	return newConn(u), nil
}

// send sends p with body and descriptors, which stay the caller's.
func (c *conn) send(p packet, body any, files ...*os.File) error {
	if body != nil {
		b, err := cbor.Marshal(body)
		if err != nil {
			return fmt.Errorf("pager: encode %s: %w", p.Op, err)
		}
		if len(b) > maxPacket/2 {
			m, err := memfile(b)
			if err != nil {
				return err
			}
			defer m.Close()
			p.Large = true
			files = append([]*os.File{m}, files...)
		} else {
			p.Body = b
		}
	}
	b, err := cbor.Marshal(p)
	if err != nil {
		return fmt.Errorf("pager: encode %s: %w", p.Op, err)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// Not Fd(), which may change the file's mode.
			rc, err := f.SyscallConn()
			if err != nil {
				return fmt.Errorf("pager: descriptor of %s: %w", f.Name(), err)
			}
			if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return fmt.Errorf("pager: descriptor of %s: %w", f.Name(), err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, _, err := c.c.WriteMsgUnix(b, oob, nil); err != nil {
		return fmt.Errorf("pager: control connection: %w", err)
	}
	return nil
}

// recv waits for a packet and the descriptors that came with it, which are the
// caller's then.
func (c *conn) recv() (packet, []*os.File, error) {
	var p packet
	n, on, flags, _, err := c.c.ReadMsgUnix(c.buf, c.oob)
	if err != nil {
		return p, nil, err
	}
	files := rights(c.oob[:on])
	fail := func(err error) (packet, []*os.File, error) {
		closeAll(files)
		return packet{}, nil, err
	}
	if n == 0 {
		return fail(io.EOF)
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return fail(errors.New("pager: truncated packet on the control connection"))
	}
	if err := decMode.Unmarshal(c.buf[:n], &p); err != nil {
		return fail(fmt.Errorf("pager: packet on the control connection: %w", err))
	}
	if p.Large {
		if len(files) == 0 {
			return fail(errors.New("pager: packet without its body"))
		}
		b, err := io.ReadAll(io.NewSectionReader(files[0], 0, 1<<32))
		files[0].Close()
		files = files[1:]
		if err != nil {
			return fail(fmt.Errorf("pager: body of a packet: %w", err))
		}
		p.Body = b
	}
	return p, files, nil
}

func rights(oob []byte) (files []*os.File) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("passed descriptor %d", fd)))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// memfile is a memfd that holds b.
func memfile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("pageferry-message", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("pager: memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "message")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, fmt.Errorf("pager: memfd: %w", err)
	}
	return f, nil
}

// decMode takes lists of any length: a fragmented process has hundreds of
// thousands of runs of pages, and both ends are ours.
var decMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxArrayElements: math.MaxInt32}.DecMode()
	if err != nil {
		panic(err)
	}
	return m
}()

func decode[T any](p packet) (v T, err error) {
	if err = decMode.Unmarshal(p.Body, &v); err != nil {
		err = fmt.Errorf("pager: body of %s: %w", p.Op, err)
	}
	return v, err
}
