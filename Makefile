# All targets do their own set-up: what is missing is installed by apt (and
# said), and a second time nothing is fetched. See CONTRIBUTING.md.

GO     ?= go
PREFIX ?= /usr/local
COUNT  ?= 10
BENCH  ?=
ARGS   ?=
CMD    ?= uname -a; rdma link
SOAK   ?= 30m

.PHONY: build test guest soak demo bench bench-rdma lint schema install clean help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: bin/.modules ## bin/pageferry
	@scripts/deps.sh libc verbs
	$(GO) build -trimpath -o bin/pageferry ./cmd/pageferry

test: bin/.modules ## everything, as root; a skipped test is a failed test
	@scripts/deps.sh cc libc verbs go python3 redis-server memcached ip gdb xxd strings guest
	@scripts/asroot.sh scripts/test.sh

guest: export CMD := $(CMD)
guest: bin/.modules ## another kernel, with soft-RoCE: CMD="rdma link" runs in it, as root
	@scripts/deps.sh cc libc verbs go guest
	@$(GO) build -o bin/guest ./test/vm/cmd/guest
	@scripts/asroot.sh bin/guest -- sh -c "$$CMD"

soak: bin/.modules ## everything at once, for SOAK=30m
	@scripts/deps.sh cc libc verbs go python3 ip
	@PAGEFERRY_SOAK=$(SOAK) scripts/asroot.sh scripts/soak.sh

demo: build ## a real redis-server moves between two hosts on this machine (ARGS="--mode postcopy")
	@scripts/deps.sh redis-server ip
	@scripts/asroot.sh bin/pageferry demo $(ARGS)

bench: build ## medians of COUNT=10 beside the limits of this machine, into bench.txt (BENCH=Switch ARGS=-short)
	@scripts/deps.sh cc libc verbs go redis-server ip
	@scripts/asroot.sh scripts/bench.sh $(COUNT) "$(BENCH)" $(ARGS)

bench-rdma: bin/.modules ## RDMA lanes beside perftest in the guest, medians of COUNT=10, into bench-rdma.txt
	@scripts/deps.sh cc libc verbs go guest
	@scripts/asroot.sh scripts/bench-rdma.sh $(COUNT)

lint: bin/.modules ## vet, format and, where it is installed, golangci-lint
	@scripts/deps.sh libc verbs
	@scripts/lint.sh

schema: bin/.modules ## configs/schema anew, after keys of a configuration file have changed
	@scripts/deps.sh libc verbs
	$(GO) generate ./configs/schema

install: build ## bin/pageferry into $(PREFIX)/bin
	install -D -m 755 bin/pageferry $(DESTDIR)$(PREFIX)/bin/pageferry

clean: ## remove what was built
	rm -rf bin bench.txt bench-rdma.txt

# Modules are fetched once for each go.sum; after that no network is needed.
bin/.modules: go.mod go.sum
	@scripts/deps.sh go
	@mkdir -p bin
	$(GO) mod download
	@touch $@
