#!/usr/bin/env bash
# All tests, as root. Called by `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PAGEFERRY_REQUIRE_ALL=1
PAGEFERRY_LEDGER=$(mktemp)
export PAGEFERRY_LEDGER
trap 'rm -f "$PAGEFERRY_LEDGER"' EXIT

failed=()
step() {
	local name=$1 began=$SECONDS
	shift
	echo "== $name"
	if "$@"; then
		echo "== $name: ok, $((SECONDS - began)) s"
	else
		echo "== $name: FAILED, $((SECONDS - began)) s"
		failed+=("$name")
	fi
}

formatted() {
	local bad
	bad=$(find . -name '*.go' -not -path './.*' -exec gofmt -l {} +)
	[[ -z $bad ]] || { echo "not in gofmt's form:"; echo "$bad"; return 1; }
}

# The packages without a kernel in them: they are quick, and repeating them on
# one processor and under the race detector shows what is otherwise rare.
quick=()
for dir in page wire codec plan pagestore transport migrate checkpoint/image appliance/journal perf/workload; do
	[[ ! -d $dir ]] || quick+=("./$dir/...")
done

step "format" formatted
step "vet" go vet ./...
# The first time this fetches a kernel, which is not to count for a test.
step "guest" go run ./test/vm/cmd/guest -prepare
# One package at a time, but for guests: those are at work beside the others. Leaks
# are found by comparing the host before and after; what another test process
# started is told apart by the marker that it carries (internal/testutil).
guests=(./dirty/... ./rdma/... ./test/onesided/... ./test/vm/...)
mapfile -t rest < <(go list ./... | grep -vxFf <(go list "${guests[@]}"))
beside=$(mktemp)
trap 'rm -f "$PAGEFERRY_LEDGER" "$beside"' EXIT
(
	status=0
	go test -count=1 -p 1 -timeout 20m "${guests[@]}" || status=1
	go test -count=1 -timeout 20m -run '^TestOverRDMA$' ./test/survive || status=1
	exit $status
) >"$beside" 2>&1 &
guests_pid=$!
step "tests" go test -count=1 -p 1 -timeout 20m -skip '^TestOverRDMA$' "${rest[@]}"
in_guests() { local status=0; wait "$guests_pid" || status=1; cat "$beside"; return $status; }
step "tests in guests, which began with the others" in_guests
step "one processor" env GOMAXPROCS=1 go test -count=1 -timeout 5m "${quick[@]}"
step "race detector" go test -race -count=1 -timeout 5m "${quick[@]}"

# What test processes side by side have both used, neither has taken away.
rmdir /sys/fs/cgroup/pageferry /sys/fs/cgroup/unified/pageferry 2>/dev/null || true

echo "== ledger"
sort -u "$PAGEFERRY_LEDGER" | awk -F '\t' '
	$1 == "skipped" { skipped++; print "skipped  " $2 ": " $3 }
	$1 == "ran"     { ran++ }
	END { printf "%d gated tests ran, %d skipped\n", ran, skipped; exit skipped > 0 }
' || failed+=("ledger")

if [[ ${#failed[@]} -gt 0 ]]; then
	echo "FAILED after $SECONDS s: ${failed[*]}"
	exit 1
fi
echo "all passed in $SECONDS s"
