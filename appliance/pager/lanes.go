package pager

import (
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"sort"
	"time"

	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/tcp"
	"golang.org/x/sys/unix"
)

// handshakeLimit is how long the other end of a lane may take to prove itself.
const handshakeLimit = 10 * time.Second

// lane shakes hands on a connection and begins to use it.
func (s *server) lane(m laneMsg, f *os.File) error {
	if m.Lane.Migration != s.cfg.ID {
		return fmt.Errorf("pager: lane of migration %s", m.Lane.Migration)
	}
	if e := s.store.Epoch(); m.Lane.Epoch != e {
		return fmt.Errorf("pager: %w: lane of epoch %d, now is %d", transport.ErrAuth, m.Lane.Epoch, e)
	}
	cfg := tcp.Config{Pool: s.pool, Log: s.log, PlainPages: true, Insecure: s.cfg.TLS == nil}
	if t := s.cfg.TLS; t != nil {
		server, _, err := keys.LoadTLS(t.CA, t.Cert, t.Key)
		if err != nil {
			return fmt.Errorf("pager: keys for page lanes: %w", err)
		}
		cfg.Server, cfg.PlainPages = server, false
	}
	ctx, cancel := context.WithTimeout(s.ctx, handshakeLimit)
	defer cancel()
	fd, err := dupHigh(f)
	if err != nil {
		return err
	}
	l, err := tcp.AcceptLane(ctx, os.NewFile(uintptr(fd), "lane"), m.Lane, m.Key, cfg)
	if err != nil {
		return err
	}
	if m.Lane.RDMA {
		if l, err = s.fabric.put(ctx, l, m, s.pool, s.log); err != nil {
			return err
		}
	}
	if err := s.fetch.Attach(l); err != nil {
		return err
	}
	if e := s.store.Epoch(); m.Lane.Epoch != e { // it has changed meanwhile
		l.Close()
		return fmt.Errorf("pager: %w: lane of epoch %d, now is %d", transport.ErrAuth, m.Lane.Epoch, e)
	}
	return nil
}

// file makes a file a source: one lane for the stream and one for the faults.
func (s *server) file(m fileMsg, f *os.File) error {
	fd, err := dupHigh(f)
	if err != nil {
		return err
	}
	for i := range m.Index {
		if r := m.Index[i].Range; r.Empty() || !r.Aligned() || i > 0 && r.Start < m.Index[i-1].Range.End {
			unix.Close(fd)
			return fmt.Errorf("pager: index entry %d of the page file, %v, is out of order or not whole pages", i, r)
		}
	}
	r := &fileReader{fd: fd, space: m.Space, index: m.Index, sums: m.Sums}
	s.fromFile.Store(true)
	for i, kind := range []transport.Kind{transport.Urgent, transport.Bulk} {
		id := transport.LaneID{Migration: s.cfg.ID, Epoch: s.store.Epoch(), Kind: kind, Index: uint8(i)}
		if err := s.fetch.Attach(stream.NewLocalLane(id, r, s.pool)); err != nil {
			return err
		}
	}
	return nil
}

// fileReader reads pages from a file. Its descriptor lives as long as the pager.
type fileReader struct {
	fd    int
	space page.Space
	index []FileRange
	sums  []uint32
}

// ReadPages wraps stream.ErrGone: there is no other file to ask.
func (r *fileReader) ReadPages(space page.Space, rs []page.Range, buf []byte) error {
	if err := r.read(space, rs, buf); err != nil {
		return fmt.Errorf("%w: %w", stream.ErrGone, err)
	}
	return nil
}

func (r *fileReader) read(space page.Space, rs []page.Range, buf []byte) error {
	if space != r.space {
		return fmt.Errorf("space %d is not in this file", space)
	}
	for _, w := range rs {
		for !w.Empty() {
			i := sort.Search(len(r.index), func(i int) bool { return r.index[i].Range.End > w.Start })
			if i == len(r.index) || w.Start < r.index[i].Range.Start {
				return fmt.Errorf("page %v is not in the file", w.Start)
			}
			e := r.index[i]
			part := w.Intersect(e.Range)
			b := buf[:part.Bytes()]
			at := e.Offset + int64(part.Start-e.Range.Start)
			for len(b) > 0 {
				n, err := unix.Pread(r.fd, b, at)
				if err == unix.EINTR {
					continue
				}
				if err != nil || n == 0 {
					return fmt.Errorf("read page %v at offset %d of the file: %d bytes, %w", part.Start, at, n, err)
				}
				b, at = b[n:], at+int64(n)
			}
			if err := r.check(part, e.Offset+int64(part.Start-e.Range.Start), buf); err != nil {
				return err
			}
			buf = buf[part.Bytes():]
			w.Start = part.End
		}
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// check compares the pages of part, which were read at offset at into b, with
// their checksums.
func (r *fileReader) check(part page.Range, at int64, b []byte) error {
	if r.sums == nil {
		return nil
	}
	for k := range part.Pages() {
		n := at>>page.Shift + int64(k)
		if n >= int64(len(r.sums)) || crc32.Checksum(b[k*page.Size:(k+1)*page.Size], castagnoli) != r.sums[n] {
			return fmt.Errorf("page %v, at offset %d of the file, is damaged", part.Start+page.Addr(k)<<page.Shift, n<<page.Shift)
		}
	}
	return nil
}
