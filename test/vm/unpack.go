package vm

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// unpack takes the kernel and the modules out of a package, into dir.
func unpack(ctx context.Context, deb, dir string) error {
	p, err := readPackage(ctx, deb)
	if err != nil {
		return err
	}
	if p.kernel == nil {
		return errors.New("it has no kernel boot/vmlinuz-*")
	}
	vmlinux, err := extract(ctx, p.kernel)
	if err != nil {
		return fmt.Errorf("the kernel: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, kernelName), vmlinux, 0o644); err != nil {
		return err
	}
	order, err := p.order(ctx, modules)
	if err != nil {
		return err
	}
	a := newArchive(nil)
	a.dir("modules")
	names := ""
	for _, m := range order {
		a.file("modules/"+m.name+".ko", 0o644, m.data)
		names += m.name + "\n"
	}
	a.file("modules/order", 0o644, []byte(names))
	return os.WriteFile(filepath.Join(dir, modulesName), a.end(), 0o644)
}

// contents is what interests us of a kernel package.
type contents struct {
	kernel  []byte
	builtin map[string]bool       // modules that are part of the kernel
	modules map[string]compressed // by name
}

// compressed is a file with the name that tells how it was compressed.
type compressed struct {
	name string
	data []byte
}

// readPackage reads all of it at once, some 100 MB: which modules are needed is
// known only after looking into others.
func readPackage(ctx context.Context, deb string) (*contents, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var errs tail
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p, err := readTar(out)
	_, _ = io.Copy(io.Discard, out)
	if werr := cmd.Wait(); werr != nil {
		return nil, fmt.Errorf("dpkg-deb: %w\n%s", werr, errs.String())
	}
	return p, err
}

func readTar(r io.Reader) (*contents, error) {
	p := &contents{builtin: map[string]bool{}, modules: map[string]compressed{}}
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if err == io.EOF {
			return p, nil
		}
		if err != nil {
			return nil, err
		}
		base := path.Base(h.Name)
		name, rest, isModule := strings.Cut(base, ".ko")
		isKernel := strings.HasPrefix(base, "vmlinuz-")
		if h.Typeflag != tar.TypeReg || !isModule && !isKernel && base != "modules.builtin" {
			continue
		}
		b, err := io.ReadAll(t)
		if err != nil {
			return nil, err
		}
		switch {
		case isKernel:
			p.kernel = b
		case isModule && (rest == "" || rest[0] == '.'):
			p.modules[moduleName(name)] = compressed{base, b}
		default:
			for line := range strings.Lines(string(b)) {
				p.builtin[moduleName(strings.TrimSuffix(path.Base(strings.TrimSpace(line)), ".ko"))] = true
			}
		}
	}
}

// Where the boot protocol has what we need of a bzImage: Documentation/arch/x86/boot.rst.
const (
	bootSetupSects    = 0x1f1
	bootMagic         = 0x202
	bootPayloadOffset = 0x248
	bootPayloadLength = 0x24c
)

// extract returns the kernel proper of a bzImage. It starts in a second, by its
// PVH entry; unpacking itself in emulation would take it many.
func extract(ctx context.Context, image []byte) ([]byte, error) {
	if len(image) < bootPayloadLength+4 || string(image[bootMagic:bootMagic+4]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	start := (int64(image[bootSetupSects])+1)*512 + int64(binary.LittleEndian.Uint32(image[bootPayloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(image[bootPayloadLength:]))
	// The payload's last four bytes are its size.
	if end-4 <= start || end > int64(len(image)) {
		return nil, errors.New("a bzImage whose payload is not in it")
	}
	payload := image[start : end-4]
	name := ""
	switch {
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		name = ".zst"
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		name = ".xz"
	case bytes.HasPrefix(payload, []byte("\x1f\x8b")):
		name, payload = ".gz", image[start:end] // the size is gzip's own
	default:
		return nil, fmt.Errorf("compressed in a way we do not know: % x", payload[:min(6, len(payload))])
	}
	b, err := compressed{name, payload}.open(ctx)
	if err == nil && !bytes.HasPrefix(b, []byte("\x7fELF")) {
		err = errors.New("what is in it is no ELF file")
	}
	return b, err
}

// open decompresses a file. xz and zstd are run as commands: this happens once,
// and their libraries would be dependencies of the whole module.
func (c compressed) open(ctx context.Context) ([]byte, error) {
	var tool string
	switch filepath.Ext(c.name) {
	case ".ko":
		return c.data, nil
	case ".gz":
		z, err := gzip.NewReader(bytes.NewReader(c.data))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(z)
	case ".xz":
		tool = "xz"
	case ".zst":
		tool = "zstd"
	default:
		return nil, fmt.Errorf("%s is compressed in a way we do not know", c.name)
	}
	cmd := exec.CommandContext(ctx, tool, "-dc")
	cmd.Stdin = bytes.NewReader(c.data)
	b, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w (on Debian: apt-get install xz-utils zstd)", tool, c.name, err)
	}
	return b, nil
}
