package fleet

import "math"

// links are the two ways of each host's link, and who sends over them. A way out
// has twice the number of its host, a way in one more.
type links struct {
	rate  []float64
	users [][]*migration
	dirty []int // ways whose users have changed

	seen  []bool
	left  []float64 // bytes per second that nobody has
	count []int     // users without a rate
}

func newLinks(rates []float64) *links {
	n := 2 * len(rates)
	l := &links{rate: make([]float64, n), users: make([][]*migration, n), seen: make([]bool, n), left: make([]float64, n), count: make([]int, n)}
	for h, r := range rates {
		l.rate[2*h], l.rate[2*h+1] = r, r
	}
	return l
}

func (m *migration) ways() [2]int { return [2]int{2 * int(m.from), 2*int(m.to) + 1} }

// touch says that a migration may do with another rate.
func (l *links) touch(m *migration) {
	w := m.ways()
	l.dirty = append(l.dirty, w[0], w[1])
}

func (l *links) add(m *migration) {
	for _, w := range m.ways() {
		l.users[w] = append(l.users[w], m)
	}
	l.touch(m)
}

// remove takes a migration away, if it is there.
func (l *links) remove(m *migration) {
	for _, w := range m.ways() {
		for i, o := range l.users[w] {
			if o == m {
				u := l.users[w]
				l.users[w] = append(u[:i], u[i+1:]...)
				l.touch(m)
				break
			}
		}
	}
}

// share finds the rates of those who have to do with a way that has changed, across
// others' links if need be. The rest keep theirs.
func (l *links) share() {
	var ways []int
	var users []*migration
	for len(l.dirty) > 0 {
		w := l.dirty[len(l.dirty)-1]
		l.dirty = l.dirty[:len(l.dirty)-1]
		if l.seen[w] {
			continue
		}
		l.seen[w] = true
		ways = append(ways, w)
		l.left[w], l.count[w] = l.rate[w], len(l.users[w])
		for _, m := range l.users[w] {
			m.fixed = false
			if w%2 == 0 { // each has one way out
				users = append(users, m)
			}
			o := m.ways()
			l.dirty = append(l.dirty, o[0], o[1])
		}
	}
	l.fill(ways, users)
	for _, w := range ways {
		l.seen[w] = false
	}
}

// fill raises the rates of all alike, until a way is full or a limit reached: those
// stay, the others go on (Bertsekas and Gallager, Data Networks, 6.5.2).
func (l *links) fill(ways []int, users []*migration) {
	for fixed := 0; fixed < len(users); {
		level, full := math.Inf(1), -1
		for _, w := range ways {
			if l.count[w] > 0 && l.left[w]/float64(l.count[w]) < level {
				level, full = l.left[w]/float64(l.count[w]), w
			}
		}
		var limited *migration
		for _, m := range users {
			if m.capped && !m.fixed && m.most < level {
				level, limited = m.most, m
			}
		}
		if limited != nil {
			l.fix(limited, level)
			fixed++
			continue
		}
		for _, m := range l.users[full] {
			if !m.fixed {
				l.fix(m, level)
				fixed++
			}
		}
	}
}

func (l *links) fix(m *migration, rate float64) {
	m.rate, m.fixed = rate, true
	for _, w := range m.ways() {
		l.left[w] = max(0, l.left[w]-rate)
		l.count[w]--
	}
}
