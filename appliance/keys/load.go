package keys

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
)

// LoadTLS returns what a host uses towards those that connect to it, and
// towards those it connects to. Both speak TLS 1.3 only, show the certificate
// in certFile and keyFile, and demand one of the authority in caFile. All three
// files are looked at in every handshake and read again when they have changed.
func LoadTLS(caFile, certFile, keyFile string) (server, client *tls.Config, err error) {
	s := &store{caFile: caFile, certFile: certFile, keyFile: keyFile}
	cert, pool, err := s.current()
	if err != nil {
		return nil, nil, err
	}
	own := func() (*tls.Certificate, error) { c, _, err := s.current(); return c, err }
	server = &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              pool,
		Certificates:           []tls.Certificate{*cert},
		SessionTicketsDisabled: true, // every connection shows its certificate
	}
	server.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		cert, pool, err := s.current()
		if err != nil {
			return nil, err
		}
		c := server.Clone()
		c.GetConfigForClient = nil
		c.ClientCAs, c.Certificates = pool, []tls.Certificate{*cert}
		return c, nil
	}
	client = &tls.Config{
		MinVersion:           tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own() },
		// Not insecure: crypto/tls can only verify a name together with the
		// chain, and against an authority that was fixed beforehand. The chain
		// is verified here in every handshake, a name by Named.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, pool, err := s.current()
			if err != nil {
				return err
			}
			return verify(cs, pool)
		},
	}
	return server, client, nil
}

func verify(cs tls.ConnectionState, pool *x509.CertPool) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("keys: the peer showed no certificate")
	}
	between := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	return nil
}

// Named returns client with one demand more: the peer must be certified under
// name.
func Named(client *tls.Config, name string) *tls.Config {
	c, chain := client.Clone(), client.VerifyConnection
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := chain(cs); err != nil {
			return err
		}
		if err := cs.PeerCertificates[0].VerifyHostname(name); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
		}
		return nil
	}
	return c
}

// store is the three files and what was last read from them.
type store struct {
	caFile, certFile, keyFile string

	mu    sync.Mutex
	stamp [3]stamp
	cert  *tls.Certificate
	pool  *x509.CertPool
}

// stamp tells one content of a file from another without reading it.
type stamp struct {
	mod  time.Time
	size int64
	info fs.FileInfo // for the inode
}

func (s stamp) same(o stamp) bool {
	return s.info != nil && o.info != nil && s.size == o.size && s.mod.Equal(o.mod) && os.SameFile(s.info, o.info)
}

// current is the certificate and the authority as the files have them now, or
// the last good ones where the files cannot be used.
func (s *store) current() (*tls.Certificate, *x509.CertPool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var now [3]stamp
	changed := s.cert == nil
	for i, f := range []string{s.caFile, s.certFile, s.keyFile} {
		info, err := os.Stat(f)
		if err != nil {
			if s.cert != nil {
				return s.cert, s.pool, nil
			}
			return nil, nil, fmt.Errorf("keys: %w", err)
		}
		now[i] = stamp{info.ModTime(), info.Size(), info}
		changed = changed || !now[i].same(s.stamp[i])
	}
	if !changed {
		return s.cert, s.pool, nil
	}
	cert, pool, err := s.read()
	if err != nil {
		if s.cert != nil {
			return s.cert, s.pool, nil // stamps stay old: the next handshake tries again
		}
		return nil, nil, err
	}
	s.stamp, s.cert, s.pool = now, cert, pool
	return cert, pool, nil
}

func (s *store) read() (*tls.Certificate, *x509.CertPool, error) {
	raw, err := os.ReadFile(s.caFile)
	if err != nil {
		return nil, nil, fmt.Errorf("keys: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(raw) {
		return nil, nil, fmt.Errorf("keys: %s holds no certificate", s.caFile)
	}
	cert, err := loadPair(s.certFile, s.keyFile)
	if err != nil {
		return nil, nil, err
	}
	_, err = cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, nil, fmt.Errorf("keys: %s does not come from the authority in %s, or its time is over: %w", s.certFile, s.caFile, err)
	}
	return cert, pool, nil
}

// loadPair reads a certificate and its key, which nobody else may read.
func loadPair(certFile, keyFile string) (*tls.Certificate, error) {
	info, err := os.Stat(keyFile)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return nil, fmt.Errorf("keys: %s has mode %04o, others can get at the key: chmod 600 %[1]s", keyFile, m)
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("keys: certificate %s and key %s: %w", certFile, keyFile, err)
	}
	if cert.Leaf == nil {
		if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
			return nil, fmt.Errorf("keys: %s: %w", certFile, err)
		}
	}
	return &cert, nil
}
