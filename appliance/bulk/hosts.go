package bulk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
)

// hosts are the daemons of a run.
type hosts struct {
	file    *File
	clients map[string]*appliance.Client
}

func openHosts(f *File) (*hosts, error) {
	_, client, err := keys.LoadTLS(f.TLS.CA, f.TLS.Cert, f.TLS.Key)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	h := &hosts{file: f, clients: map[string]*appliance.Client{}}
	for name, host := range f.Hosts {
		h.clients[name] = appliance.NewRemoteClient(host.Endpoint(), name, client)
	}
	return h, nil
}

func (h *hosts) close() {
	for _, c := range h.clients {
		c.Close()
	}
}

func (h *hosts) names() []string { return slices.Sorted(maps.Keys(h.file.Hosts)) }

// askTimeout is how long a daemon may take to list its processes.
const askTimeout = 30 * time.Second

// census are the processes of every host. What cannot be asked is an error that names all
// such hosts: a plan without them would be of something else.
func (h *hosts) census(ctx context.Context) (map[string][]appliance.ProcessInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	out, errs := map[string][]appliance.ProcessInfo{}, []error{}
	for _, name := range h.names() {
		wg.Go(func() {
			ps, err := h.clients[name].Processes(ctx, h.file.pidFiles(name)...)
			mu.Lock()
			defer mu.Unlock()
			if out[name] = ps; err != nil {
				errs = append(errs, fmt.Errorf("host %s: %w", name, err))
			}
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}
