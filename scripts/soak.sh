#!/usr/bin/env bash
# Everything at once for a long time, as root. Called by `make soak`.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PAGEFERRY_REQUIRE_ALL=1 PAGEFERRY_SOAK=${PAGEFERRY_SOAK:-30m}
exec go test -count=1 -timeout 3h -v -run 'TestEverythingAtOnce' ./test/survive
