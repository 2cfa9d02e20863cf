package appliance

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"

	"github.com/pageferry/pageferry/appliance/keys"
)

// DefaultAPIPort is where the API of a daemon with "api_listen: :7301" is.
const DefaultAPIPort = 7301

// validateAPI is the part of Validate for it.
func (c *Config) validateAPI(bad func(field, format string, args ...any) error) error {
	if slices.Contains(c.Operators, "") {
		return bad("operators", "holds an empty name")
	}
	switch {
	case c.APIListen == "" && len(c.Operators) > 0:
		return bad("operators", "have nowhere to go without api_listen; write \"api_listen: :%d\"", DefaultAPIPort)
	case c.APIListen != "" && c.Insecure:
		return bad("api_listen", "needs tls: whoever may use the API may end processes of this host")
	case c.APIListen != "" && len(c.Operators) == 0:
		return bad("api_listen", "is for nobody; name certificates in operators")
	}
	return nil
}

// serveNetwork serves the API over mutual TLS until ctx ends, where that is configured.
func (d *Daemon) serveNetwork(ctx context.Context, ready <-chan struct{}) error {
	if d.config.APIListen == "" {
		return nil
	}
	server, _, err := keys.LoadTLS(d.config.TLS.CA, d.config.TLS.Cert, d.config.TLS.Key)
	if err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	select {
	case <-ready:
	case <-ctx.Done():
		return nil
	}
	l, err := net.Listen("tcp", d.config.APIListen)
	if err != nil {
		return fmt.Errorf("api: %w", err)
	}
	defer l.Close()
	return (&api{d: d, log: d.log}).serve(ctx, tls.NewListener(l, server), d.operators)
}

// operators lets those through whose certificate names one, and says in the log who asked
// for what that changes something, and who was turned away.
func (d *Daemon) operators(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 { // the handshake has seen to it
			reply(w, http.StatusForbidden, APIError{Kind: KindRefused, Message: "no certificate was shown"})
			return
		}
		name := r.TLS.PeerCertificates[0].Subject.CommonName
		may := slices.Contains(d.config.Operators, name)
		if !may || r.Method != http.MethodGet {
			d.log.Info("asked over the network", "operator", name, "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path, "allowed", may)
		}
		if !may {
			reply(w, http.StatusForbidden, APIError{Kind: KindRefused,
				Message: fmt.Sprintf("%q is not one of the operators in the configuration of %s", name, d.config.Name)})
			return
		}
		next.ServeHTTP(w, r)
	})
}
