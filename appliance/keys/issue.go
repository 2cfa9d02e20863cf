package keys

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Validity of certificates. An authority outlives several generations of hosts.
const (
	AuthorityValidity = 10 * 365 * 24 * time.Hour
	HostValidity      = 2 * 365 * 24 * time.Hour

	// skew is how far behind a host's clock may be.
	skew = time.Hour
)

// Files of an authority.
const (
	AuthorityCert = "ca.pem"
	AuthorityKey  = "ca-key.pem"
)

// HostFiles are the names of the certificate and the key of a host.
func HostFiles(name string) (cert, key string) { return name + ".pem", name + "-key.pem" }

// nameForm is what a host may be called: a name of DNS, which is a file name too.
var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// CheckName reports whether a host can be certified under name.
func CheckName(name string) error {
	switch {
	case name == "ca" || strings.HasSuffix(name, "-key"):
		return fmt.Errorf("keys: a file of host %q could be taken for another's here; choose another name", name)
	case !nameForm.MatchString(name) || strings.Contains(name, ".."):
		return fmt.Errorf("keys: %q is no name for a host: want lower-case letters, digits, dots, dashes and underscores, at most 63, a letter or digit at both ends", name)
	}
	return nil
}

// Init makes an authority in dir, which is made if it is not there.
func Init(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	tmpl, err := template("pageferry authority", AuthorityValidity)
	if err != nil {
		return err
	}
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.MaxPathLenZero = true, true, true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	return writePair(filepath.Join(dir, AuthorityCert), der, filepath.Join(dir, AuthorityKey), key)
}

// Issue certifies a host called name by the authority in dir, and writes its
// certificate and key into out, which is made if it is not there. A name that
// is an IPv4 address is certified as one.
func Issue(dir, name, out string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	ca, caKey, err := loadAuthority(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o700); err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	tmpl, err := template(name, HostValidity)
	if err != nil {
		return err
	}
	if tmpl.NotAfter.After(ca.NotAfter) {
		tmpl.NotAfter = ca.NotAfter
	}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if ip := net.ParseIP(name); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, &key.PublicKey, caKey)
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	cert, keyFile := HostFiles(name)
	return writePair(filepath.Join(out, cert), der, filepath.Join(out, keyFile), key)
}

func template(name string, validity time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(validity),
	}, nil
}

func loadAuthority(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certFile, keyFile := filepath.Join(dir, AuthorityCert), filepath.Join(dir, AuthorityKey)
	pair, err := loadPair(certFile, keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w; make an authority with: pageferry keys init %s", err, dir)
	}
	if err != nil {
		return nil, nil, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, nil, fmt.Errorf("keys: %s is not an authority's", certFile)
	}
	if time.Now().After(pair.Leaf.NotAfter) {
		return nil, nil, fmt.Errorf("keys: the authority in %s ended on %s; make a new one", dir, pair.Leaf.NotAfter.Format(time.DateOnly))
	}
	return pair.Leaf, key, nil
}

// writePair writes both files or neither.
func writePair(certFile string, der []byte, keyFile string, key *ecdsa.PrivateKey) error {
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	if err := writeNew(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})); err != nil {
		return err
	}
	if err := writeNew(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		os.Remove(keyFile)
		return err
	}
	return nil
}

// writeNew makes path with content, whole and on disk, or not at all.
func writeNew(path string, content []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".keys-*") // made with mode 0600
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	// A link fails where a rename would overwrite.
	if err := os.Link(f.Name(), path); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keys: %w; move it away if it is no longer needed", err)
	} else if err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	d, err := os.Open(dir)
	if err == nil {
		err = d.Sync()
		d.Close()
	}
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("keys: %w", err)
	}
	return nil
}
