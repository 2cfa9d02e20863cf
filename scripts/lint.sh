#!/usr/bin/env bash
# Vet, format, and golangci-lint where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

bad=$(find . -name '*.go' -not -path './.*' -exec gofmt -l {} +)
[[ -z $bad ]] || { echo "not in gofmt's form:"; echo "$bad"; exit 1; }
go vet ./...
if command -v golangci-lint >/dev/null; then
	golangci-lint run
elif command -v staticcheck >/dev/null; then
	staticcheck ./...
else
	echo "golangci-lint is not installed: only gofmt and go vet ran"
fi
