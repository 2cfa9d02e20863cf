package journal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/fxamacker/cbor/v2"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

// The file: a header block and slots, all of blockSize bytes, little-endian.
//
//	header   0  8  magic "PGFJRNL1"
//	         8  4  block size
//	        12  4  number of slots
//	        16 16  migration
//	        32  1  role: 1 source, 2 destination
//	        33  4  CRC32C of bytes 0 to 32
//
//	slot     0  4  length of the record in bytes
//	         4  8  sequence number, from 1
//	        12  4  CRC32C of bytes 0 to 11, the migration, the role and the record
//	        16     record: CBOR
//
// The migration is part of a slot's checksum so that blocks of another file,
// which a damaged file system may show, are not taken for ours.
const (
	magic      = "PGFJRNL1"
	blockSize  = 4096
	slots      = 16
	fileSize   = blockSize * (1 + slots)
	headerSize = 37
	slotHeader = 16
	// MaxRecord is the most bytes of an encoded record.
	MaxRecord = blockSize - slotHeader
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	encMode cbor.EncMode
	decMode cbor.DecMode
)

func init() {
	opts := cbor.CoreDetEncOptions()
	opts.Time = cbor.TimeRFC3339NanoUTC
	var err error
	if encMode, err = opts.EncMode(); err != nil {
		panic(err) // constant options
	}
	decMode, err = cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden,
		MaxNestedLevels: 8, MaxArrayElements: 4096, MaxMapPairs: 256,
	}.DecMode()
	if err != nil {
		panic(err)
	}
}

// Journal is the file of one migration at one side.
type Journal struct {
	store *Store
	name  string
	id    transport.MigrationID
	role  migrate.Role

	mu   sync.Mutex // guards the next, and the order of writes
	file *os.File
	seq  uint64         // of the last record tried
	at   int            // slot that it was tried in
	good int            // slot of the last one that is durable; -1: none
	last migrate.Record // that one
}

var _ migrate.Journal = (*Journal)(nil)

func roleByte(r migrate.Role) byte {
	if r == migrate.RoleSource {
		return 1
	}
	return 2
}

// blank is the whole file with its first record.
func (j *Journal) blank(first migrate.Record) ([]byte, error) {
	b := make([]byte, fileSize)
	copy(b, j.header())
	slot, err := j.encode(first, 1)
	if err != nil {
		return nil, err
	}
	copy(b[blockSize:], slot)
	j.seq, j.at, j.good, j.last = 1, 0, 0, first
	return b, nil
}

func (j *Journal) header() []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.LittleEndian.AppendUint32(b, blockSize)
	b = binary.LittleEndian.AppendUint32(b, slots)
	b = append(b, j.id[:]...)
	b = append(b, roleByte(j.role))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// encode returns a block.
func (j *Journal) encode(r migrate.Record, seq uint64) ([]byte, error) {
	if r.Migration != j.id || r.Role != j.role {
		return nil, fmt.Errorf("journal %s: record of %v as %s", j.name, r.Migration, r.Role)
	}
	body, err := encMode.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", j.name, err)
	}
	if len(body) > MaxRecord {
		return nil, fmt.Errorf("journal %s: record of %d bytes, at most %d", j.name, len(body), MaxRecord)
	}
	b := make([]byte, 0, blockSize)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint64(b, seq)
	b = binary.LittleEndian.AppendUint32(b, j.checksum(b, body))
	b = append(b, body...)
	return b[:blockSize], nil
}

func (j *Journal) checksum(head, body []byte) uint32 {
	c := crc32.Checksum(head[:12], castagnoli)
	c = crc32.Update(c, castagnoli, j.id[:])
	c = crc32.Update(c, castagnoli, []byte{roleByte(j.role)})
	return crc32.Update(c, castagnoli, body)
}

// decode reads a block. ok is false for one that was never written, or torn.
func (j *Journal) decode(b []byte) (seq uint64, r migrate.Record, ok bool) {
	n := binary.LittleEndian.Uint32(b)
	if n == 0 || n > MaxRecord {
		return 0, r, false
	}
	body := b[slotHeader : slotHeader+n]
	if binary.LittleEndian.Uint32(b[12:]) != j.checksum(b, body) {
		return 0, r, false
	}
	if err := decMode.Unmarshal(body, &r); err != nil || r.Migration != j.id || r.Role != j.role {
		return 0, migrate.Record{}, false
	}
	return binary.LittleEndian.Uint64(b[4:]), r, true
}

type entry struct {
	seq  uint64
	slot int
	rec  migrate.Record
}

// scan returns the whole records in their order.
func (j *Journal) scan() ([]entry, error) {
	b := make([]byte, fileSize)
	n, err := j.file.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if n < fileSize {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrDamaged, n, fileSize)
	}
	if h := j.header(); string(b[:headerSize]) != string(h) {
		return nil, fmt.Errorf("%w: the header is not that of %s", ErrDamaged, j.name)
	}
	var es []entry
	for i := range slots {
		if seq, r, ok := j.decode(b[blockSize*(1+i) : blockSize*(2+i)]); ok {
			es = append(es, entry{seq, i, r})
		}
	}
	if len(es) == 0 {
		return nil, fmt.Errorf("%w: no record is whole", ErrDamaged)
	}
	slices.SortFunc(es, func(a, b entry) int {
		if a.seq < b.seq {
			return -1
		}
		return 1
	})
	return es, nil
}

func (j *Journal) load() error {
	es, err := j.scan()
	if err != nil {
		return err
	}
	e := es[len(es)-1]
	j.seq, j.at, j.good, j.last = e.seq, e.slot, e.slot, e.rec
	return nil
}

// Append implements migrate.Journal. The slot of the last durable record is
// never the one that is written.
func (j *Journal) Append(r migrate.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return fmt.Errorf("journal %s: %w", j.name, os.ErrClosed)
	}
	seq, at := j.seq+1, (j.at+1)%slots
	if at == j.good {
		at = (at + 1) % slots
	}
	b, err := j.encode(r, seq)
	if err != nil {
		return err
	}
	// Also when it fails: it may be there all the same, and what comes after it
	// must count for more.
	j.seq, j.at = seq, at
	if err := j.store.write(j.file, j.name, b, int64(blockSize*(1+at))); err != nil {
		return fmt.Errorf("journal %s: %w", j.name, err)
	}
	j.good, j.last = at, r
	return nil
}

// Last implements migrate.Journal.
func (j *Journal) Last() (migrate.Record, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.last, nil
}

// All returns the records that are still in the ring, oldest first.
func (j *Journal) All() ([]migrate.Record, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil, fmt.Errorf("journal %s: %w", j.name, os.ErrClosed)
	}
	es, err := j.scan()
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", j.name, err)
	}
	rs := make([]migrate.Record, len(es))
	for i, e := range es {
		rs[i] = e.rec
	}
	return rs, nil
}

// Remove implements migrate.Journal.
func (j *Journal) Remove() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.store.remove(j.name); err != nil {
		return fmt.Errorf("journal %s: %w", j.name, err)
	}
	return j.closeLocked()
}

// Close implements migrate.Journal.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.closeLocked()
}

func (j *Journal) closeLocked() error {
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file = nil
	return err
}
