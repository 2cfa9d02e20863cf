package tcp

import (
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/transport"
)

// BenchmarkZeroCopy sends payloads of 256 KiB from a pool's buffers: by a write,
// which copies, with MSG_ZEROCOPY, and by vmsplice and splice. It also reports
// for which part of the bytes the kernel copied after all: on loopback, and
// wherever a packet is received on the host that sent it, it always does for
// MSG_ZEROCOPY (skb_orphan_frags_rx), so that only a real network device shows
// what that saves.
//
// Splicing copies nothing on loopback, and nothing says when the pages may be
// changed again: not before the receiver has read them. The payload is the same
// all the time here. A server could use it only for pages that never change.
func BenchmarkZeroCopy(b *testing.B) {
	pool, err := transport.NewPool(1, bulkPayload)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := pool.Close(); err != nil {
			b.Error(err)
		}
	})
	out := pool.Get(bulkPayload, nil)
	defer out.Release()
	for i := range out.Bytes() {
		out.Bytes()[i] = byte(i)
	}
	in := make([]byte, bulkPayload)
	far := func(fd int) func() error {
		return func() error {
			for got := 0; got < bulkPayload; {
				n, _, err := unix.Recvfrom(fd, in[got:], unix.MSG_WAITALL)
				if err != nil || n == 0 {
					return errors.Join(err, io.ErrUnexpectedEOF)
				}
				got += n
			}
			return nil
		}
	}
	wide := func() [2]int {
		fd := blockingPair(b)
		for _, s := range fd {
			for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
				if err := unix.SetsockoptInt(s, unix.SOL_SOCKET, opt, defaultBulkBuffer); err != nil {
					b.Fatal(err)
				}
			}
		}
		return fd
	}
	plain, zc, sp := wide(), wide(), wide()
	var z zeroCopy
	if err := unix.SetsockoptInt(zc[0], unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1); err != nil {
		b.Fatal(err)
	}
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	if _, err := unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, bulkPayload); err != nil {
		b.Fatal(err)
	}
	cs := []contestant{
		duel(b, "write", func() error {
			for p := out.Bytes(); len(p) > 0; {
				n, err := unix.Write(plain[0], p)
				if err != nil {
					return err
				}
				p = p[n:]
			}
			return nil
		}, far(plain[1])),
		duel(b, "zerocopy", func() error { return z.send(zc[0], out.Bytes()) }, far(zc[1])),
		duel(b, "splice", func() error { return spliceAll(pipe, sp[0], out.Bytes()) }, far(sp[1])),
	}
	// Processor time of both ends tells more than the rate: the machine may be
	// busy with something else.
	spent, moved := make([]float64, len(cs)), make([]float64, len(cs))
	for i := range cs {
		run := cs[i].run
		cs[i].run = func(n int) error {
			before := processorTime(b)
			err := run(n)
			spent[i] += processorTime(b) - before
			moved[i] += float64(n) * bulkPayload / (1 << 30)
			return err
		}
	}
	contest(b, bulkPayload, 64, cs)
	for i, c := range cs {
		b.ReportMetric(spent[i]/moved[i]*1000, c.name+"-cpu-ms/GiB")
	}
	if z.done > 0 {
		b.ReportMetric(float64(z.copied)/float64(z.done), "copied/zerocopy")
	}
}

// processorTime is what this process has used so far, in seconds.
func processorTime(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// zeroCopy counts what the kernel says of what was sent.
type zeroCopy struct{ sent, done, copied int }

func (z *zeroCopy) send(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.SendmsgBuffers(fd, [][]byte{p}, nil, nil, unix.MSG_ZEROCOPY)
		if err != nil {
			return err
		}
		z.sent++
		p = p[n:]
	}
	oob := make([]byte, 128)
	for {
		_, n, _, _, err := unix.Recvmsg(fd, nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return err
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			return err
		}
		for _, m := range msgs {
			// struct sock_extended_err of linux/errqueue.h: errno, origin, type,
			// code, pad, info, data. info to data are the calls that are done.
			d := m.Data
			if len(d) < 16 || d[4] != unix.SO_EE_ORIGIN_ZEROCOPY {
				continue
			}
			k := int(binary.NativeEndian.Uint32(d[12:])-binary.NativeEndian.Uint32(d[8:])) + 1
			z.done += k
			if d[6]&unix.SO_EE_CODE_ZEROCOPY_COPIED != 0 {
				z.copied += k
			}
		}
	}
}

// spliceAll puts the pages of p, not their content, into the pipe, and from there
// into the socket.
func spliceAll(pipe []int, fd int, p []byte) error {
	for len(p) > 0 {
		v := unix.Iovec{Base: &p[0]}
		v.SetLen(len(p))
		n, err := unix.Vmsplice(pipe[1], []unix.Iovec{v}, 0)
		if err != nil {
			return err
		}
		p = p[n:]
		for n > 0 {
			k, err := unix.Splice(pipe[0], nil, fd, nil, n, unix.SPLICE_F_MOVE)
			if err != nil {
				return err
			}
			n -= int(k)
		}
	}
	return nil
}
