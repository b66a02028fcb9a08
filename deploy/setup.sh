#!/usr/bin/env bash
# Makes .venv with everything from the lock file; as root it also installs the Debian packages that are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

# Debian's own interpreter is what operators run, and it is compiled with profiles: another that stands before it in
# PATH took 1.4 times as long for the simulation.
python=/usr/bin/python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || python=$(command -v python3)

missing=()
need() { command -v "$1" >/dev/null 2>&1 || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need etcd etcd-server
need etcdctl etcd-client
need mkfs.xfs xfsprogs
need mkfs.btrfs btrfs-progs
need btrbk btrbk
need mkfs.ext4 e2fsprogs
need setfacl acl
need losetup mount
need ip iproute2
need nft nftables
need rsync rsync
need openssl openssl
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
need zfs-fuse zfs-fuse
need spin spin
need gcc gcc  # compiles what spin writes
[[ -e /usr/include/stdio.h ]] || missing+=(libc6-dev)
if [[ $(uname -m) == x86_64 ]]; then  # the machine that tests what needs the device mapper
  need linux.uml user-mode-linux
  need lvm lvm2
  need thin_delta thin-provisioning-tools
  need modprobe kmod
fi
"$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if ((${#missing[@]})); then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # Debian starts etcd as a service when it is installed; the tests and the demo start their own.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
      printf '#!/bin/sh\nexit 101\n' >"$policy"
      chmod 755 "$policy"
      trap 'rm -f "$policy"' EXIT
    fi
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  else
    say "not root: going on without ${missing[*]} (as root they would be installed)"
  fi
fi

if [[ ! -x .tools/bin/uv ]]; then
  say "installing uv into .tools"
  "$python" -m venv .tools
  .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
fi
say "installing the locked packages into .venv and generating the gRPC stubs"
.tools/bin/uv sync --quiet --frozen --compile-bytecode --python "$python" --reinstall-package resilver
say "ready"
