package keys

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority makes one with a host in a directory of their own.
func authority(t *testing.T, hosts ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	if err := Init(dir); err != nil {
		t.Fatal(err)
	}
	for _, h := range hosts {
		if err := Issue(dir, h, dir); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func load(t *testing.T, caDir, dir, name string) (server, client *tls.Config) {
	t.Helper()
	cert, key := HostFiles(name)
	server, client, err := LoadTLS(filepath.Join(caDir, AuthorityCert), filepath.Join(dir, cert), filepath.Join(dir, key))
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

// meet does a handshake and returns what each side says of it.
func meet(t *testing.T, server, client *tls.Config) (s, c *tls.Conn, serverErr, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	end := time.Now().Add(10 * time.Second)
	a.SetDeadline(end)
	b.SetDeadline(end)
	s, c = tls.Server(a, server), tls.Client(b, client)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte{1})
		} else {
			a.Close()
		}
		done <- err
	}()
	clientErr = c.Handshake()
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1)) // TLS 1.3: only now has the server judged
	} else {
		b.Close()
	}
	return s, c, <-done, clientErr
}

func TestMeet(t *testing.T) {
	dir := authority(t, "alpha", "beta", "10.0.0.7")
	server, _ := load(t, dir, dir, "alpha")
	_, client := load(t, dir, dir, "beta")
	s, c, e1, e2 := meet(t, server, client)
	if err := errors.Join(e1, e2); err != nil {
		t.Fatal(err)
	}
	if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("TLS version %#x", v)
	}
	if n := s.ConnectionState().PeerCertificates[0].DNSNames; len(n) != 1 || n[0] != "beta" {
		t.Errorf("server sees %v", n)
	}
	if n := c.ConnectionState().PeerCertificates[0].DNSNames; len(n) != 1 || n[0] != "alpha" {
		t.Errorf("client sees %v", n)
	}
	if _, _, e1, e2 := meet(t, server, Named(client, "alpha")); e1 != nil || e2 != nil {
		t.Errorf("right name: %v, %v", e1, e2)
	}
	var bad *tls.CertificateVerificationError
	if _, _, _, err := meet(t, server, Named(client, "gamma")); !errors.As(err, &bad) {
		t.Errorf("wrong name: %v", err)
	}
	if _, _, _, err := meet(t, server, Named(client, "10.0.0.7")); !errors.As(err, &bad) {
		t.Errorf("an address in place of the name: %v", err)
	}
	byAddress, _ := load(t, dir, dir, "10.0.0.7")
	if _, _, e1, e2 := meet(t, byAddress, Named(client, "10.0.0.7")); e1 != nil || e2 != nil {
		t.Errorf("certified address: %v, %v", e1, e2)
	}
}

func TestStrangers(t *testing.T) {
	dir, other := authority(t, "alpha"), authority(t, "mallory")
	server, client := load(t, dir, dir, "alpha")
	badServer, badClient := load(t, other, other, "mallory")
	if _, _, err, _ := meet(t, server, badClient); err == nil {
		t.Error("a client of another authority was let in")
	}
	if _, _, _, err := meet(t, badServer, client); err == nil {
		t.Error("a server of another authority was accepted")
	}
	trusting := badClient.Clone()
	trusting.VerifyConnection = nil // as an attacker would
	if _, _, err, _ := meet(t, server, trusting); err == nil {
		t.Error("a client of another authority that verifies nothing was let in")
	}
	trusting.GetClientCertificate = nil
	if _, _, err, _ := meet(t, server, trusting); err == nil {
		t.Error("a client without a certificate was let in")
	}
	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, _, err, _ := meet(t, server, old); err == nil {
		t.Error("TLS 1.2 was let in")
	}
	if _, _, err := LoadTLS(filepath.Join(dir, AuthorityCert), filepath.Join(other, "mallory.pem"), filepath.Join(other, "mallory-key.pem")); err == nil || !strings.Contains(err.Error(), "does not come from the authority") {
		t.Errorf("a certificate of another authority was loaded: %v", err)
	}
}

// A renewed certificate is shown, and a new authority believed, without a new
// LoadTLS; half a replacement changes nothing.
func TestRotation(t *testing.T) {
	dir := authority(t, "alpha", "beta")
	server, client := load(t, dir, dir, "alpha")
	serial := func() string {
		t.Helper()
		_, c, e1, e2 := meet(t, server, client)
		if err := errors.Join(e1, e2); err != nil {
			t.Fatal(err)
		}
		return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := serial()
	next := t.TempDir()
	if err := Issue(dir, "alpha", next); err != nil {
		t.Fatal(err)
	}
	cert, key := HostFiles("alpha")
	move := func(from, to, name string) {
		t.Helper()
		if err := os.Rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
	move(next, dir, key)
	if serial() != before {
		t.Error("half a replacement was used")
	}
	move(next, dir, cert)
	after := serial()
	if after == before {
		t.Error("the new certificate is not shown")
	}
	other := authority(t, "alpha")
	move(other, dir, AuthorityCert)
	move(other, dir, cert)
	move(other, dir, key)
	if serial() == after {
		t.Error("the new authority's certificate is not shown")
	}
}

func TestFiles(t *testing.T) {
	dir := authority(t, "alpha")
	for _, f := range []string{AuthorityCert, AuthorityKey, "alpha.pem", "alpha-key.pem"} {
		info, err := os.Stat(filepath.Join(dir, f))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	content := func() (all string) {
		es, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			all += e.Name() + string(b)
		}
		return all
	}
	before := content()
	if err := Init(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an authority was overwritten: %v", err)
	}
	if err := Issue(dir, "alpha", dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a host's key was overwritten: %v", err)
	}
	if content() != before {
		t.Error("what was refused left traces")
	}
	// The certificate alone is there: neither it nor a key may be touched.
	half := t.TempDir()
	if err := os.WriteFile(filepath.Join(half, "alpha.pem"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Issue(dir, "alpha", half); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a certificate was overwritten: %v", err)
	}
	if es, _ := os.ReadDir(half); len(es) != 1 {
		t.Errorf("half a pair was left: %v", es)
	}
	for _, name := range []string{"", "ca", "x-key", "../up", "a/b", "a..b", ".hidden", "UPPER", "dash-", "naïve", strings.Repeat("a", 64)} {
		if err := Issue(dir, name, dir); err == nil {
			t.Errorf("%q was certified", name)
		}
	}
	if err := Issue(t.TempDir(), "alpha", dir); err == nil || !strings.Contains(err.Error(), "keys init") {
		t.Errorf("without an authority: %v", err)
	}
	key := filepath.Join(dir, "alpha-key.pem")
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadTLS(filepath.Join(dir, AuthorityCert), filepath.Join(dir, "alpha.pem"), key); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others can read was used: %v", err)
	}
}
