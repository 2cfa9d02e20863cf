package checkpoint

import (
	"fmt"
	"os"
	"time"

	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// survey is what is read while the process still runs, because reading it costs
// much: smaps walks the page tables, 10 ms for each GiB. At the freeze the
// mappings are read again, which costs little, and only their flags (VmFlags) are
// taken from here.
type survey struct {
	pid  int
	at   time.Time
	maps []proc.Mapping
	ids  map[mappedKey]image.FileID
	// beside: by SurveyBeside, for the Survey that follows.
	beside bool
}

// surveyAge is how old a survey may be at the freeze: what madvise(2) changes of
// the flags of a whole mapping meanwhile is not noticed.
const surveyAge = 500 * time.Millisecond

// fresh reports whether s was read for a Survey now, and is good for a Freeze after it.
func (s *survey) fresh() bool { return s != nil && s.beside && time.Since(s.at) < surveyAge/2 }

// SurveyBeside begins what the next Survey would read and waits for, and returns.
// Everything else may be called meanwhile. It does nothing where that was read a
// moment ago.
func (s *Session) SurveyBeside() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.usable() != nil || s.held || s.reading != nil || s.survey.fresh() {
		return
	}
	done := make(chan struct{})
	s.reading = done
	go func() {
		defer close(done)
		hashFiles(s.pid)
		read, err := takeSurvey(s.pid)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reading = nil
		if err == nil { // else whoever needs it finds out
			read.beside = true
			s.survey = read
		}
	}()
}

// awaitReading waits for what SurveyBeside began; mu is held, and let go of meanwhile.
func (s *Session) awaitReading() {
	if done := s.reading; done != nil {
		s.mu.Unlock()
		<-done
		s.mu.Lock()
	}
}

func takeSurvey(pid int) (*survey, error) {
	maps, err := proc.ReadSmaps(pid)
	if err != nil {
		return nil, err
	}
	s := &survey{pid: pid, at: time.Now(), maps: maps, ids: make(map[mappedKey]image.FileID)}
	for i := range maps {
		if m := &maps[i]; m.Ino != 0 {
			// One that cannot be looked at now may be gone at the freeze.
			_, _ = s.fileID(m)
		}
	}
	return s, nil
}

// mappings returns the mappings as they are now, with flags. Where the process does
// not stand still some may be out of date already.
func (s *survey) mappings() ([]proc.Mapping, error) {
	now, err := proc.ReadMaps(s.pid)
	if err != nil {
		return nil, err
	}
	old := s.maps
	for i := range now {
		m := &now[i]
		for len(old) > 0 && old[0].End <= m.Start {
			old = old[1:]
		}
		if len(old) == 0 || !sameKind(m, &old[0]) {
			// Something new: then there is no way around the long walk.
			return proc.ReadSmaps(s.pid)
		}
		m.Flags = old[0].Flags
	}
	return now, nil
}

// sameKind reports whether m is the mapping o, perhaps grown, shrunk or split.
func sameKind(m, o *proc.Mapping) bool {
	if !m.Overlaps(o.Range) || m.Prot != o.Prot || m.Shared != o.Shared || m.Dev != o.Dev || m.Ino != o.Ino || m.Name != o.Name {
		return false
	}
	return m.Ino == 0 || m.Offset-uint64(m.Start) == o.Offset-uint64(o.Start)
}

// mapFile is the file behind a mapping, whatever its name leads to by now.
func mapFile(pid int, r page.Range) string {
	return fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, uint64(r.Start), uint64(r.End))
}

// fileID describes the file behind a mapping.
func (s *survey) fileID(m *proc.Mapping) (image.FileID, error) {
	key := keyOf(m)
	if id, ok := s.ids[key]; ok {
		return id, nil
	}
	id, err := s.describe(mapFile(s.pid, m.Range), !m.Shared && m.Prot != 0)
	if err != nil {
		return id, fmt.Errorf("mapping of %s: %w", m.Name, err)
	}
	s.ids[key] = id
	return id, nil
}

// describe looks at a file by a link of /proc, for more than its status where it is
// to be known at the destination.
func (s *survey) describe(link string, closely bool) (image.FileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return image.FileID{}, proc.Gone(s.pid, &os.PathError{Op: "stat", Path: link, Err: err})
	}
	id := image.FileID{Dev: st.Dev, Ino: st.Ino, Size: st.Size, MTimeNS: st.Mtim.Nano(), Mode: st.Mode}
	if closely && st.Mode&unix.S_IFMT == unix.S_IFREG {
		if id.BuildID = fileid.BuildID(link); id.BuildID == "" {
			id.Hash = fileid.Known(&st)
		}
	}
	return id, nil
}

// maxHashed bounds what hashFiles reads for one process.
const maxHashed = 1 << 30

// hashFiles sees to it that files without a build id are known by their content, which
// a survey then notes. It reads them, and is for the time when the process runs.
func hashFiles(pid int) {
	maps, err := proc.ReadMaps(pid)
	if err != nil {
		return // whoever needs them finds out
	}
	seen := map[mappedKey]bool{}
	hashed := int64(0)
	for i := range maps {
		m := &maps[i]
		if m.Prot == 0 || seen[keyOf(m)] || !privateFile(m) {
			continue
		}
		seen[keyOf(m)] = true
		link := mapFile(pid, m.Range)
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxHashed-hashed || fileid.Known(&st) != "" {
			continue
		}
		if fileid.BuildID(link) == "" {
			if _, err := fileid.Hash(link); err == nil {
				hashed += st.Size
			}
		}
	}
}
