#!/usr/bin/env bash
# Usage: bench.sh COUNT [BENCH] [GO-TEST-FLAG...]
# Runs the benchmarks of perf/bench, each with COUNT migrations of which medians
# are taken, into bench.txt: in the format of Go's own benchmarks, with the
# environment at its head and the table of targets at its end. BENCH picks some,
# as in "Switch", "Throughput/stop" or "Precopy/(qemu|idle)". QEMU and iperf3 are
# peers where they are installed; nothing here installs them. The largest benchmark
# needs 18 GiB of free memory and is left out where there is less.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PAGEFERRY_REQUIRE_ALL=1
export PAGEFERRY_BIN=$PWD/bin/pageferry
count=${1:-10}
pattern=${2:-}
shift $(($# < 2 ? $# : 2))

{
	echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
	go test ./perf/bench -run '^$' -bench "^Benchmark$pattern" -benchtime "${count}x" -timeout 180m "$@"
} | tee bench.txt
