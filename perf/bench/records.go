package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"
)

// Records starts a redis-server and fills it with about size bytes of records as
// programs keep them: JSON of names, addresses, times, counts, and a token of random
// characters, which no compression makes less of.
func (s *Stage) Records(ctx context.Context, size uint64) (*Guest, error) {
	g, _, err := s.Redis(ctx, 0)
	if err != nil {
		return nil, err
	}
	nc, err := s.lab.Dial(ctx, "tcp", redisAddress(g.Host.Addr().String()))
	if err != nil {
		return nil, err
	}
	c := newRedisConn(nc)
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Minute)); err != nil {
		return nil, err
	}
	rng := rand.New(rand.NewPCG(uint64(1), 7))
	const batch = 200 // in one MSET
	for id := 0; uint64(id)*recordBytes < size; {
		args := []string{"MSET"}
		for range batch {
			args = append(args, "user:"+strconv.Itoa(id), record(rng, id))
			id++
		}
		if _, err := c.do(args...); err != nil {
			return nil, fmt.Errorf("loading redis-server: %w", err)
		}
	}
	return g, nil
}

// recordBytes is about what redis needs for one.
const recordBytes = 520

var (
	forenames = []string{"Ada", "Barbara", "Edsger", "Frances", "Grace", "Hedy", "John", "Karen", "Leslie", "Margaret", "Niklaus", "Radia", "Tim", "Whitfield"}
	surnames  = []string{"Allen", "Dijkstra", "Diffie", "Hamilton", "Hopper", "Jones", "Lamarr", "Lamport", "Liskov", "Lovelace", "Perlman", "Backus", "Wirth", "Lee"}
	places    = []string{"Amsterdam", "Berlin", "Boston", "Lagos", "Lima", "Lyon", "Nairobi", "Osaka", "Oslo", "Pune", "Seoul", "Toronto"}
	hosts     = []string{"example.com", "example.net", "mail.example.org"}
)

func record(r *rand.Rand, id int) string {
	pick := func(of []string) string { return of[r.IntN(len(of))] }
	first, last := pick(forenames), pick(surnames)
	seen := time.Unix(1_700_000_000+r.Int64N(50_000_000), 0).UTC()
	return fmt.Sprintf(`{"id":%d,"name":{"first":%q,"last":%q},"email":"%s.%s%d@%s","city":%q,"created":%q,"last_seen":%q,`+
		`"logins":%d,"balance":%.2f,"address":"%d.%d.%d.%d","verified":%t,"token":"%016x%016x%016x%016x","flags":["active","newsletter"],"preferences":{"theme":"dark","language":"en"}}`,
		id, first, last, first, last, r.IntN(10000), pick(hosts), pick(places), seen.Add(-time.Duration(r.IntN(1e9))*time.Millisecond).Format(time.RFC3339),
		seen.Format(time.RFC3339), r.IntN(5000), r.Float64()*1000, 10, r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(3) > 0,
		r.Uint64(), r.Uint64(), r.Uint64(), r.Uint64())
}
