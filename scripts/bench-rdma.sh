#!/usr/bin/env bash
# Usage: bench-rdma.sh COUNT
# Holds RDMA lanes and one-sided reads against perftest on two soft-RoCE devices in
# a guest, COUNT times in turns, with two processors and with one, and then post-copy
# over RDMA against post-copy over TCP, into bench-rdma.txt. The guest is emulated: only the ratios mean anything, and those
# only where nothing else runs.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
count=${1:-5}

go build -o bin/guest ./test/vm/cmd/guest
go build -o bin/pageferry ./cmd/pageferry
go test -c -o bin/rdma.test ./rdma
go test -c -o bin/survive.test ./test/survive
bin/guest -prepare
{
	echo "commit: $(git describe --always --dirty 2>/dev/null || echo unknown)"
	echo "perftest: $(ib_read_lat --version 2>&1 | head -n 1)"
	for cpus in 2 1; do
		echo "host: load $(cut -d ' ' -f 1-3 /proc/loadavg) on $(nproc) processors"
		bin/guest -q -cpus "$cpus" -limit 30m -- env PAGEFERRY_REQUIRE_ALL=1 "$PWD/bin/rdma.test" \
			-test.run '^$' -test.bench '^BenchmarkTargets$' -test.benchtime "${count}x" -test.timeout 30m
	done
	bin/guest -q -limit 30m -- env PAGEFERRY_REQUIRE_ALL=1 PAGEFERRY_BIN="$PWD/bin/pageferry" "$PWD/bin/survive.test" \
		-test.run '^$' -test.bench '^BenchmarkTransports$' -test.benchtime "${count}x" -test.timeout 30m
} | tee bench-rdma.txt
