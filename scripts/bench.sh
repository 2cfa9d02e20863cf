#!/usr/bin/env bash
# Usage: bench.sh COUNT
# Runs the benchmarks COUNT times into bench.txt, in the format of Go's own
# benchmarks with the environment at its head (benchstat reads both).
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PAGEFERRY_REQUIRE_ALL=1
{
	echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
	echo "kernel: $(uname -sr)"
	echo "go: $(go env GOVERSION)"
	echo "processors: $(nproc)"
	echo "memory: $(awk '/^MemTotal/ { print int($2 / 1024) " MiB" }' /proc/meminfo)"
	echo "thp: $(cat /sys/kernel/mm/transparent_hugepage/enabled 2>/dev/null || echo none)"
	# Only packages that have benchmarks: the others would be built for nothing.
	packages=$(grep -rl --include='*_test.go' '^func Benchmark' . | xargs -r -n1 dirname | sort -u)
	[[ -n $packages ]] || { echo "no benchmarks" >&2; exit 1; }
	# shellcheck disable=SC2086
	go test -run '^$' -bench . -count "${1:-10}" -p 1 -timeout 60m $packages
} | tee bench.txt
