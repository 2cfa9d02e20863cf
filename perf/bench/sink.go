package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/lab"
)

const sinkArg0 = "pageferry-bench-sink"

// sinkReport is what the sink says of one connection.
type sinkReport struct {
	Bytes int64         `json:"bytes"`
	CPU   time.Duration `json:"cpu"`
	Err   string        `json:"err"`
}

// runSink takes connections at the address, one after the other, reads each to
// its end and reports.
func runSink(address string) error {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	go func() { // ends with whoever started it
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	enc := json.NewEncoder(os.Stdout)
	if err := enc.Encode(sinkReport{}); err != nil { // ready
		return err
	}
	buf := make([]byte, writeBytes)
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		var r sinkReport
		began := processCPU()
		for {
			n, err := c.Read(buf)
			r.Bytes += int64(n)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					r.Err = err.Error()
				}
				break
			}
		}
		c.Close()
		r.CPU = processCPU() - began
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
}

// processCPU is the processor time that this process has used.
func processCPU() time.Duration {
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// sink is the other end of a socket, on the destination's host.
type sink struct {
	prog    *lab.Program
	in, out *os.File
	reports *bufio.Reader
	dial    func(context.Context) (net.Conn, error)
}

const sinkPort = "7399"

func (s *Stage) newSink() (_ *sink, err error) {
	from, to := s.Hosts()
	address := net.JoinHostPort(to.Addr().String(), sinkPort)
	p, err := s.startPiped(to, "sink", sinkArg0, address)
	if err != nil {
		return nil, err
	}
	k := &sink{in: p.in, out: p.out, reports: bufio.NewReader(p.out), prog: p.prog}
	k.dial = func(ctx context.Context) (net.Conn, error) { return from.Dial(ctx, "tcp", address) }
	if _, err := k.report(); err != nil {
		return nil, errors.Join(err, k.close())
	}
	return k, nil
}

func (k *sink) report() (r sinkReport, err error) {
	if err := k.out.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return r, err
	}
	line, err := k.reports.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err == nil && r.Err != "" {
		err = errors.New(r.Err)
	}
	if err != nil {
		return r, fmt.Errorf("socket's other end: %w", err)
	}
	return r, nil
}

func (k *sink) close() error {
	err := k.in.Close()
	if k.prog != nil {
		err = errors.Join(err, k.prog.Wait())
	}
	return errors.Join(err, k.out.Close())
}

// writeBytes is the size of a write, and of a frame's payload at most.
const writeBytes = 256 << 10

// send writes bytes to the sink and returns the processor time of both ends,
// and how long it took.
func (k *sink) send(ctx context.Context, bytes int) (cpu, wall time.Duration, err error) {
	c, err := k.dial(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	buf := make([]byte, writeBytes)
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	began, used := time.Now(), processCPU()
	for left := bytes; left > 0; {
		n, err := c.Write(buf[:min(left, len(buf))])
		if err != nil {
			return 0, 0, err
		}
		left -= n
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, 0, err
	}
	r, err := k.report()
	if err == nil && r.Bytes != int64(bytes) {
		err = fmt.Errorf("%d of %d bytes arrived", r.Bytes, bytes)
	}
	return processCPU() - used + r.CPU, time.Since(began), err
}
