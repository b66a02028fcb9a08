#!/usr/bin/env bash
# Makes .venv with everything from the lock file; as root it also installs the Debian packages that are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

missing=()
need() { command -v "$1" >/dev/null 2>&1 || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need etcd etcd-server
need etcdctl etcd-client
need mkfs.xfs xfsprogs
need mkfs.btrfs btrfs-progs
need mkfs.ext4 e2fsprogs
need setfacl acl
need losetup mount
need rsync rsync
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
need zfs-fuse zfs-fuse
need spin spin
need gcc gcc  # compiles what spin writes
[[ -e /usr/include/stdio.h ]] || missing+=(libc6-dev)
if [[ $(uname -m) == x86_64 ]]; then  # the machine that tests what needs the device mapper
  need qemu-system-x86_64 qemu-system-x86
  need lvm lvm2
  need thin_delta thin-provisioning-tools
  need modprobe kmod
fi
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
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

# That machine's kernel: unpacked beside the project, never installed, so that nothing of this host's start is touched.
if [[ $(uname -m) == x86_64 && $(id -u) == 0 ]] && command -v apt-get >/dev/null &&
  ! python3 -c 'from tests.vm.image import Kernel; Kernel.find()' 2>/dev/null; then
  package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')
  if [[ -n $package ]]; then
    say "unpacking $package into .tools/kernel"
    rm -rf .tools/kernel && mkdir -p .tools/kernel
    (cd .tools/kernel && apt-get download -qq "$package" && dpkg -x ./*.deb . && rm ./*.deb)
    depmod -b .tools/kernel "${package#linux-image-}"
  else
    say "no kernel for the test machine: linux-image-cloud-amd64 is not to be had here"
  fi
fi

if [[ ! -x .tools/bin/uv ]]; then
  say "installing uv into .tools"
  python3 -m venv .tools
  .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
fi
say "installing the locked packages into .venv and generating the gRPC stubs"
.tools/bin/uv sync --quiet --frozen --compile-bytecode --python "$(command -v python3)" --reinstall-package resilver
say "ready"
