package appliance

import (
	"sync"

	"github.com/pageferry/pageferry/transport"
)

// memoryClaims is what arriving processes were promised and have not got yet.
type memoryClaims struct {
	mu sync.Mutex
	by map[transport.MigrationID]func() uint64
}

func (c *memoryClaims) set(id transport.MigrationID, left func() uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by = map[transport.MigrationID]func() uint64{}
	}
	c.by[id] = left
}

func (c *memoryClaims) drop(id transport.MigrationID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.by, id)
}

func (c *memoryClaims) sum() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	var n uint64
	for _, left := range c.by {
		n += left()
	}
	return n
}

// count is how many processes are arriving.
func (c *memoryClaims) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.by)
}
