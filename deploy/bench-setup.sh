#!/usr/bin/env bash
# What only `make bench` uses: the others that it measures, as far as Debian packages them, and what draws the plots.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'bench-setup: %s\n' "$*"; }

missing=()
need() { command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need nbdcopy libnbd-bin
need nbdkit nbdkit
need qemu-img qemu-utils
need casync casync
need bdsync bdsync
if ((${#missing[@]})) && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  for package in "${missing[@]}"; do  # one by one: not every release has all of them
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 \
      && say "installed $package" || say "$package cannot be had: it will be shown as not installed"
  done
fi
say "installing matplotlib into .venv"
.tools/bin/uv sync --quiet --frozen --group bench
