#!/usr/bin/env bash
# Usage: asroot.sh COMMAND ARG...
# Runs a command as root, by sudo where needed, with the caller's Go modules
# (only read) and root's own build cache, so that no file of the caller's comes
# to belong to root.
set -euo pipefail

if [[ $EUID -eq 0 ]]; then
	exec "$@"
fi
if ! command -v sudo >/dev/null; then
	echo "this needs root, and there is no sudo: run make as root" >&2
	exit 1
fi
echo "as root: $*"
keep=(HOME=/root "PATH=$PATH")
if command -v go >/dev/null; then
	keep+=("GOMODCACHE=$(go env GOMODCACHE)" "GOFLAGS=$(go env GOFLAGS) -buildvcs=false" "GOTOOLCHAIN=$(go env GOTOOLCHAIN)")
fi
exec sudo -E env "${keep[@]}" "$@"
