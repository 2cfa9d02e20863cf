package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// Gone adds ErrGone to the errors that the end of process pid causes, and
// returns others, nil included, as they are.
func Gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pid %d: %w: %w", pid, ErrGone, err)
	}
	return err
}

// scanner takes fields off the front of a line.
type scanner struct{ b []byte }

// hex takes a hexadecimal number that ends at sep, and sep.
func (s *scanner) hex(sep byte) (v uint64, ok bool) {
	i := 0
	for ; i < len(s.b) && s.b[i] != sep; i++ {
		c := s.b[i]
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		default:
			return 0, false
		}
		if i >= 16 {
			return 0, false
		}
		v = v<<4 | uint64(c)
	}
	if i == 0 || i == len(s.b) {
		return 0, false
	}
	s.b = s.b[i+1:]
	return v, true
}

// dec takes a decimal number that ends at a space or the end.
func (s *scanner) dec() (v uint64, ok bool) {
	i := 0
	for ; i < len(s.b) && s.b[i] != ' '; i++ {
		c := s.b[i] - '0'
		if c > 9 || v > (1<<64-1-uint64(c))/10 {
			return 0, false
		}
		v = v*10 + uint64(c)
	}
	s.b = s.b[i:]
	return v, i > 0
}

// word takes what comes before the next space, and the space.
func (s *scanner) word() (w []byte, ok bool) {
	i := bytes.IndexByte(s.b, ' ')
	if i <= 0 {
		return nil, false
	}
	w, s.b = s.b[:i], s.b[i+1:]
	return w, true
}
