package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// EnvKernel names a variable that says which kernel a guest shall have: the name
// of a package, or the path of one (.deb).
const EnvKernel = "PAGEFERRY_GUEST_KERNEL"

// What Debian calls its kernel packages: linux-image-6.12.48+deb12-amd64, without
// the flavours (cloud, rt) and what is not signed.
var (
	kernelPattern   = regexp.MustCompile(`^linux-image-\d+\.\d+\.[0-9]\S*-amd64$`)
	flavourPattern  = regexp.MustCompile(`-(cloud|rt|unsigned|dbg)\b|-rt-`)
	preferredKernel = "linux-image-6.12."
)

// fetch returns the path of a kernel package: the one that is wanted, or what apt
// offers, downloaded to dir.
func fetch(ctx context.Context, dir, wanted string) (string, error) {
	if _, err := os.Stat(wanted); strings.HasSuffix(wanted, ".deb") || err == nil {
		return wanted, err
	}
	deb, err := download(ctx, dir, wanted)
	if err == nil {
		return deb, nil
	}
	// Lists of packages are often missing, or older than what servers still have.
	out, updateErr := exec.CommandContext(ctx, "apt-get", "update", "-q").CombinedOutput()
	if updateErr != nil {
		return "", fmt.Errorf("%w; and apt-get update: %w\n%s", err, updateErr, out)
	}
	deb, err = download(ctx, dir, wanted)
	if err != nil {
		return "", fmt.Errorf("%w (fetch a package linux-image-*-amd64 of Linux 6.8 or later yourself and set %s to its path)", err, EnvKernel)
	}
	return deb, nil
}

func download(ctx context.Context, dir, wanted string) (string, error) {
	name := wanted
	if name == "" {
		out, err := run(ctx, dir, "apt-cache", "pkgnames", "linux-image-")
		if err != nil {
			return "", err
		}
		if name = choose(strings.Fields(string(out))); name == "" {
			return "", errors.New("apt offers no package linux-image-*-amd64")
		}
	}
	// As root it would become _apt, who may not write to a directory of root's.
	if _, err := run(ctx, dir, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s left %q", name, debs)
	}
	// In names of files apt writes a colon, which an epoch has, as %3a.
	return debs[0], nil
}

// choose returns the newest of kernel packages: of 6.12, on which the tests are
// known to run, else of all; "" if there is none.
func choose(names []string) string {
	best := ""
	for _, name := range names {
		if !kernelPattern.MatchString(name) || flavourPattern.MatchString(name) {
			continue
		}
		preferred, bestPreferred := strings.HasPrefix(name, preferredKernel), strings.HasPrefix(best, preferredKernel)
		if best == "" || preferred && !bestPreferred || preferred == bestPreferred && newer(name, best) {
			best = name
		}
	}
	return best
}

var numbers = regexp.MustCompile(`\d+`)

// newer compares the numbers in two names of packages.
func newer(a, b string) bool {
	versions := func(s string) []string {
		return numbers.FindAllString(strings.ReplaceAll(s, "amd64", ""), -1)
	}
	x, y := versions(a), versions(b)
	for i := range min(len(x), len(y)) {
		n, _ := strconv.ParseUint(x[i], 10, 64)
		m, _ := strconv.ParseUint(y[i], 10, 64)
		if c := cmp.Compare(n, m); c != 0 {
			return c > 0
		}
	}
	return len(x) > len(y)
}

// run runs a command in dir and returns what it wrote to its standard output.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var errs tail
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, errs.String())
	}
	return out, nil
}
