package fleet

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pageferry/pageferry/plan"
)

// Simulation is a run on paper: a [Schedule], links that the running migrations
// share max-min fairly, and for each migration the rules of [plan.Rounds] over a process
// that writes at its dirty rate anywhere in its memory. There is no clock and all chance comes from
// Seed, so it gives the same figures everywhere.
//
// What it leaves out makes it gloomy: working sets, pages that are skipped since they were
// written again before their turn, compression, zero pages. What makes it rosy is
// that nothing but links is ever short, processors for one.
//
// Its time grows with the migrations that run at once: give the fleet limits.
type Simulation struct {
	Fleet Fleet
	To    map[string]string // where each process goes. Default: [Place] decides
	Order Order             // default: LPT
	// PreCopy sends everything before the switch, and gives up where that does not
	// converge. Default: hybrid.
	PreCopy     bool
	MaxDowntime time.Duration // default: as in [plan.Config]
	State       time.Duration // what a switch takes without pages. Default: 15 ms
	Setup       time.Duration // from the beginning to the first page. Default: 100 ms
	// Failures is the probability that a migration fails, somewhere in its first
	// round. Which ones do is the same in every order.
	Failures float64
	Seed     uint64
}

// Event is the beginning or the end of a migration.
type Event struct {
	At   time.Duration
	ID   string
	What What
}

// What happened to a migration.
type What string

const (
	Began  What = "began"
	Done   What = "done"
	Failed What = "failed"
)

// Result is what came of a [Simulation].
type Result struct {
	Order Order
	Total time.Duration
	// Bound is what the links would take at least for what arrived, see [Bound].
	Bound       time.Duration
	Downtime    time.Duration // of all programs together
	MaxDowntime time.Duration // of one
	Bytes       uint64        // of pages, sent
	Memory      uint64        // bytes that arrived, each counted once
	Done        int
	PostCopy    int // of these, switched before all was there
	Failed      int
	Refused     int // by Place
	Most        int // migrations that ran at one time
	Events      []Event
}

type phase int

const (
	setup phase = iota
	round
	switching
	following // post-copy
)

// migration is one that runs.
type migration struct {
	process  *Process
	from, to int32
	rounds   *plan.Rounds
	measure  plan.Measure
	phase    phase
	until    float64 // nothing is sent before
	left     float64 // bytes of the phase
	began    float64 // the phase
	frozen   float64
	failing  bool
	rate     float64
	most     float64 // its share of the budget
	capped   bool    // has a most
	fixed    bool    // while rates are found
}

type simulation struct {
	Simulation
	hosts    *hosts
	schedule *Schedule
	links    *links
	running  []*migration
	process  map[string]*Process
	fails    map[string]float64 // after which part of the memory
	now      float64
	res      Result
}

// Run simulates. The error says what is wrong with the fleet.
func (m Simulation) Run() (*Result, error) {
	s := &simulation{Simulation: m, process: map[string]*Process{}, fails: map[string]float64{}}
	if s.Order == "" {
		s.Order = LPT
	}
	if s.State == 0 {
		s.State = 15 * time.Millisecond
	}
	if s.Setup == 0 {
		s.Setup = time.Duration(each * float64(time.Second))
	}
	if err := s.Fleet.Validate(); err != nil {
		return nil, err
	}
	if s.To == nil {
		p := Place(s.Fleet)
		s.To, s.res.Refused = p.To, len(p.Refused)
	}
	var err error
	if s.schedule, err = newSchedule(s.Fleet, s.To, s.Order); err != nil {
		return nil, err
	}
	s.hosts = s.schedule.hosts
	s.links = newLinks(s.hosts.rate)
	rng := rand.New(rand.NewPCG(s.Seed, 11))
	for i := range s.Fleet.Processes {
		p := &s.Fleet.Processes[i]
		s.process[p.ID] = p
		if fails, after := rng.Float64() < s.Failures, rng.Float64(); fails {
			s.fails[p.ID] = after
		}
	}
	s.res.Order = s.Order
	if err := s.run(); err != nil {
		return nil, err
	}
	arrived := map[string]string{}
	for _, e := range s.res.Events {
		if e.What == Done {
			arrived[e.ID] = s.To[e.ID]
		}
	}
	s.res.Bound, _ = Bound(s.Fleet, arrived)
	s.res.Total = seconds(s.now)
	return &s.res, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func (s *simulation) run() error {
	for {
		for _, id := range s.schedule.Next() {
			s.begin(id)
		}
		s.res.Most = max(s.res.Most, len(s.running))
		if len(s.running) == 0 {
			if left := s.schedule.Left(); left > 0 {
				return fmt.Errorf("fleet: %d processes wait and nothing runs: a mistake in the schedule", left)
			}
			return nil
		}
		s.share()
		s.advance()
		var still []*migration
		for _, m := range s.running {
			over := false
			for !over && m.left <= 0 && m.until <= s.now {
				var err error
				if over, err = s.step(m); err != nil {
					return err
				}
			}
			if !over {
				still = append(still, m)
			}
		}
		s.running = still
	}
}

func (s *simulation) event(id string, what What) {
	s.res.Events = append(s.res.Events, Event{seconds(s.now), id, what})
}

func (s *simulation) begin(id string) {
	s.schedule.Begin(id)
	s.event(id, Began)
	p := s.process[id]
	s.running = append(s.running, &migration{process: p, from: s.hosts.number[p.Host], to: s.hosts.number[s.To[id]],
		until: s.now + s.Setup.Seconds(), began: s.now})
}

// share gives those their rates that send.
func (s *simulation) share() {
	if s.Fleet.Limits.Budget > 0 {
		var send []*migration
		var rs []Running
		for _, m := range s.running {
			if m.left > 0 && m.until <= s.now {
				send = append(send, m)
				rs = append(rs, Running{ID: m.process.ID, Left: uint64(m.left), DirtyRate: m.process.DirtyRate, Rate: m.rate,
					PostCopy: m.phase == following})
			}
		}
		for i, most := range Share(s.Fleet.Limits.Budget, rs) {
			if m := send[i]; m.most != most {
				m.most, m.capped = most, true
				s.links.touch(m)
			}
		}
	}
	s.links.share()
}

// advance goes to the next time at which something changes.
func (s *simulation) advance() {
	next, first := 0.0, -1
	at := func(m *migration) float64 {
		switch {
		case m.until > s.now:
			return m.until
		case m.left <= 0:
			return s.now
		}
		return s.now + m.left/m.rate
	}
	for i, m := range s.running {
		if t := at(m); first < 0 || t < next {
			next, first = t, i
		}
	}
	for i, m := range s.running {
		if m.until > s.now {
			if m.until <= next {
				m.until = next
				if m.left > 0 {
					s.links.add(m)
				}
			}
			continue
		}
		if m.left -= m.rate * (next - s.now); i == first || m.left < 0.5 {
			m.left = 0 // rounding
		}
	}
	s.now = next
}

// step ends a phase of a migration and begins the next one.
func (s *simulation) step(m *migration) (over bool, err error) {
	s.links.remove(m)
	switch m.phase {
	case setup:
		cfg := plan.Config{PostCopy: !s.PreCopy, MaxDowntime: s.MaxDowntime}
		if m.rounds, err = plan.NewRounds(cfg); err != nil {
			return false, err
		}
		m.measure = plan.Measure{Dirty: m.process.Memory, State: s.State}
		after, fails := s.fails[m.process.ID]
		if m.failing = fails; fails {
			s.send(m, round, after*float64(m.process.Memory))
			return false, nil
		}
	case round:
		if m.failing {
			s.end(m, Failed)
			return true, nil
		}
		took := max(seconds(s.now-m.began), time.Microsecond)
		written := uint64(min(m.process.DirtyRate*took.Seconds(), float64(m.process.Memory)))
		m.measure = plan.Measure{Round: m.measure.Round + 1, Sent: m.measure.Dirty, Took: took, Written: written,
			Elapsed: took, Dirty: written, State: s.State}
	case switching, following:
		if m.phase == switching {
			s.down(s.now - m.frozen)
		}
		s.end(m, Done)
		return true, nil
	}
	d := m.rounds.Next(m.measure)
	switch d.Action {
	case plan.Round:
		s.send(m, round, float64(m.measure.Dirty))
	case plan.GiveUp:
		s.end(m, Failed)
		return true, nil
	case plan.PostCopy:
		m.until = s.now + s.State.Seconds()
		s.down(s.State.Seconds())
		s.res.PostCopy++
		s.send(m, following, float64(m.measure.Dirty))
	case plan.Switch:
		m.until, m.frozen = s.now+s.State.Seconds(), s.now
		s.send(m, switching, float64(m.measure.Dirty))
	}
	return false, nil
}

func (s *simulation) send(m *migration, p phase, bytes float64) {
	m.phase, m.left, m.began = p, bytes, s.now
	s.res.Bytes += uint64(bytes)
	if bytes > 0 && m.until <= s.now {
		s.links.add(m)
	}
}

func (s *simulation) down(took float64) {
	s.res.Downtime += seconds(took)
	s.res.MaxDowntime = max(s.res.MaxDowntime, seconds(took))
}

func (s *simulation) end(m *migration, what What) {
	s.schedule.End(m.process.ID, what == Done)
	s.event(m.process.ID, what)
	if what == Failed {
		s.res.Failed++
		return
	}
	s.res.Done++
	s.res.Memory += m.process.Memory
}
