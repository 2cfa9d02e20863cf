#!/usr/bin/env bash
# Usage: deps.sh NEED...
# Installs by apt what is missing of the needs, and says what. Where nothing is
# missing it does nothing at all, so that it works without a network.
set -euo pipefail

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
packages=()

have() { command -v "$1" >/dev/null 2>&1; }

for need in "$@"; do
	case $need in
	go)
		if ! have go; then
			echo "pageferry needs Go 1.21 or newer: https://go.dev/dl (Debian 12's own package is too old)" >&2
			exit 1
		fi
		# From 1.21 on the go command fetches the version that go.mod asks for.
		version=$(GOTOOLCHAIN=local go env GOVERSION)
		minor=${version#go1.}
		minor=${minor%%[!0-9]*}
		if [[ $version == go1.* && ${minor:-0} -lt 21 ]]; then
			echo "pageferry needs Go 1.21 or newer, this is $version: https://go.dev/dl" >&2
			exit 1
		fi
		;;
	cc) have cc || packages+=(gcc) ;;
	libc) # only of use to a C compiler; Go builds without, too
		if have cc && ! echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1; then
			packages+=(libc6-dev)
		fi
		;;
	verbs) # only to build rdma, and only with a C compiler; the library itself is loaded where it is there
		if have cc && ! echo '#include <infiniband/verbs.h>' | cc -E - >/dev/null 2>&1; then
			packages+=(libibverbs-dev)
		fi
		;;
	strings) have strings || packages+=(binutils) ;;
	ip) have ip || packages+=(iproute2) ;;
	guest) # what boots a guest, and soft-RoCE's programs and libraries in it (test/vm)
		have qemu-system-x86_64 || packages+=(qemu-system-x86)
		have xz || packages+=(xz-utils)
		have zstd || packages+=(zstd)
		have rdma || packages+=(iproute2)
		have ibv_devinfo || packages+=(ibverbs-utils)
		have ib_write_bw || packages+=(perftest)
		[[ -e /etc/libibverbs.d/rxe.driver ]] || packages+=(ibverbs-providers)
		[[ -e /usr/include/infiniband/verbs.h ]] || packages+=(libibverbs-dev)
		;;
	*) have "$need" || packages+=("$need") ;;
	esac
done

if [[ ${#packages[@]} -eq 0 ]]; then
	exit 0
fi
if ! have apt-get; then
	echo "missing: ${packages[*]} (no apt-get here: install them yourself)" >&2
	exit 1
fi

sudo=()
if [[ $EUID -ne 0 ]]; then
	if ! have sudo; then
		echo "missing: ${packages[*]} (no sudo here: run this as root)" >&2
		exit 1
	fi
	sudo=(sudo)
fi

echo "installing with apt: ${packages[*]}"

# Tests start servers of their own. The packages' services are not started, now
# (policy-rc.d) or at boot, where the package was not there before.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
	"${sudo[@]}" chmod 755 "$policy"
	trap '"${sudo[@]}" rm -f "$policy"' EXIT
fi
"${sudo[@]}" apt-get update -q
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
if have systemctl; then
	for p in "${packages[@]}"; do
		case $p in
		redis-server | memcached)
			echo "the service $p stays off: systemctl enable --now $p switches it on"
			"${sudo[@]}" systemctl disable "$p" >/dev/null 2>&1 || true
			;;
		esac
	done
fi
