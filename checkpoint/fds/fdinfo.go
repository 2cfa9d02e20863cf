package fds

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// errFDInfo is wrapped by what parseFDInfo returns.
var errFDInfo = errors.New("fdinfo not understood")

// fdInfo is what /proc/PID/fdinfo/N says (fs/proc/fd.c and the show_fdinfo of
// each kind of file).
type fdInfo struct {
	Pos   int64
	Flags int // O_CLOEXEC included
	Mount int
	Ino   uint64
	Locks []lockInfo

	EventCount uint64
	Semaphore  bool

	Epoll []epollInfo

	SigMask uint64

	Watches []watchInfo

	Clock    int
	SetFlags int
	Ticks    uint64
	Value    time.Duration
	Interval time.Duration

	SCM int // descriptors in flight to a unix socket
	Pid int // that a pidfd names
}

type lockInfo struct {
	image.Lock
	Kind string // FLOCK, POSIX, OFDLCK, LEASE, ...
}

type epollInfo struct {
	FD     int
	Events uint32
	Data   uint64
	Ino    uint64
	Dev    uint64 // as stat says it
}

type watchInfo struct {
	WD         int
	Ino        uint64
	Dev        uint64 // as stat says it
	Mask       uint32
	HandleType int32
	Handle     []byte // nil where the file system has none
}

// parseFDInfo never panics, whatever b is.
func parseFDInfo(b []byte) (fdInfo, error) {
	var in fdInfo
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte{'\n'})
		b = rest
		if err := in.line(string(line)); err != nil {
			return in, fmt.Errorf("%w: %q: %v", errFDInfo, line, err)
		}
	}
	return in, nil
}

func (in *fdInfo) line(s string) (err error) {
	if rest, ok := strings.CutPrefix(s, "inotify "); ok {
		return in.watch(rest)
	}
	key, value, ok := strings.Cut(s, ":")
	if !ok {
		return nil // a kind of file that this program does not carry
	}
	value = strings.TrimSpace(value)
	switch key {
	case "pos":
		in.Pos, err = strconv.ParseInt(value, 10, 64)
	case "flags":
		var f uint64
		f, err = strconv.ParseUint(value, 8, 32)
		in.Flags = int(f)
	case "mnt_id":
		in.Mount, err = strconv.Atoi(value)
	case "ino":
		in.Ino, err = strconv.ParseUint(value, 10, 64)
	case "lock":
		return in.lock(value)
	case "eventfd-count":
		in.EventCount, err = strconv.ParseUint(value, 16, 64)
	case "eventfd-semaphore":
		in.Semaphore = value != "0"
	case "tfd":
		return in.target(value)
	case "sigmask":
		in.SigMask, err = strconv.ParseUint(value, 16, 64)
	case "clockid":
		in.Clock, err = strconv.Atoi(value)
	case "ticks":
		in.Ticks, err = strconv.ParseUint(value, 10, 64)
	case "settime flags":
		var f uint64
		f, err = strconv.ParseUint(value, 8, 31)
		in.SetFlags = int(f)
	case "it_value":
		in.Value, err = timespec(value)
	case "it_interval":
		in.Interval, err = timespec(value)
	case "scm_fds":
		in.SCM, err = strconv.Atoi(value)
	case "Pid":
		in.Pid, err = strconv.Atoi(value)
	}
	return err
}

// timespec parses "(seconds, nanoseconds)".
func timespec(s string) (time.Duration, error) {
	a, b, ok := strings.Cut(strings.Trim(s, "()"), ",")
	if !ok {
		return 0, errors.New("not a time")
	}
	sec, err := strconv.ParseInt(strings.TrimSpace(a), 10, 64)
	if err != nil {
		return 0, err
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(b), 10, 64)
	if err != nil {
		return 0, err
	}
	const most = int64(1<<63-1) / int64(time.Second)
	if sec < 0 || ns < 0 || ns >= int64(time.Second) || sec >= most {
		return 0, errors.New("time out of range")
	}
	return time.Duration(sec)*time.Second + time.Duration(ns), nil
}

// lock parses "1: FLOCK  ADVISORY  WRITE 123 fe:00:131 0 EOF".
func (in *fdInfo) lock(s string) error {
	f := strings.Fields(s)
	if len(f) != 8 {
		return errors.New("not a lock")
	}
	l := lockInfo{Kind: f[1]}
	l.Lock.Kind = f[1]
	l.Write = f[3] == "WRITE"
	var err error
	if l.Start, err = strconv.ParseInt(f[6], 10, 64); err != nil {
		return err
	}
	if f[7] != "EOF" {
		end, err := strconv.ParseInt(f[7], 10, 64)
		if err != nil {
			return err
		}
		if end < l.Start || end == 1<<63-1 {
			return errors.New("lock ends before it starts")
		}
		l.Len = end - l.Start + 1
	}
	if l.Start < 0 {
		return errors.New("lock starts below zero")
	}
	in.Locks = append(in.Locks, l)
	return nil
}

// target parses what follows "tfd:", an epoll registration:
// "5 events: 19 data: 7fff0000  pos:0 ino:61ef1 sdev:7". The last three came with
// Linux 4.13.
func (in *fdInfo) target(s string) error {
	f := strings.Fields(strings.NewReplacer("events:", " events ", "data:", " data ", "pos:", " pos ", "ino:", " ino ", "sdev:", " sdev ").Replace(s))
	if len(f) < 5 || len(f)%2 == 0 {
		return errors.New("not an epoll registration")
	}
	var e epollInfo
	var err error
	if e.FD, err = strconv.Atoi(f[0]); err != nil {
		return err
	}
	for i := 1; i < len(f); i += 2 {
		if f[i] == "pos" {
			continue
		}
		v, err := strconv.ParseUint(f[i+1], 16, 64)
		if err != nil {
			return err
		}
		switch f[i] {
		case "events":
			e.Events = uint32(v)
		case "data":
			e.Data = v
		case "ino":
			e.Ino = v
		case "sdev":
			e.Dev = userDev(v)
		}
	}
	in.Epoll = append(in.Epoll, e)
	return nil
}

// watch parses what follows "inotify ": "wd:1 ino:9e7e sdev:800013 mask:800afce
// ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d".
func (in *fdInfo) watch(s string) error {
	var w watchInfo
	for f := range strings.FieldsSeq(s) {
		key, value, ok := strings.Cut(f, ":")
		if !ok {
			return errors.New("not a watch")
		}
		if key == "f_handle" {
			h, err := hex.DecodeString(value)
			if err != nil {
				return err
			}
			w.Handle = h
			continue
		}
		v, err := strconv.ParseUint(value, 16, 64)
		if err != nil {
			return err
		}
		switch key {
		case "wd":
			w.WD = int(int32(v))
		case "ino":
			w.Ino = v
		case "sdev":
			w.Dev = userDev(v)
		case "mask":
			w.Mask = uint32(v)
		case "fhandle-type":
			w.HandleType = int32(v)
		}
	}
	if w.WD <= 0 {
		return errors.New("watch without a number")
	}
	in.Watches = append(in.Watches, w)
	return nil
}

// userDev turns the kernel's own device number (20 bits of minor) into that of
// stat(2), as new_encode_dev does.
func userDev(d uint64) uint64 {
	major, minor := d>>20, d&0xfffff
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}
