#!/usr/bin/env bash
# Makes .openzfs, which the machine of tests/openzfs boots: Debian's cloud kernel, and a first file system with OpenZFS'
# module for that kernel, its tools and what is to be loaded. It takes ten minutes and 1 GiB, of which 20 MiB stay; as
# root it also installs the packages that it builds with. Nothing of the host's sources of packages is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/.openzfs

say() { printf 'openzfs-setup: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

[[ -e $out/vmlinuz && -e $out/initramfs ]] && exit 0
[[ $(uname -m) == x86_64 ]] || fail "only for x86_64"
. /etc/os-release
[[ ${VERSION_CODENAME:-} == bookworm ]] || fail "the kernel and OpenZFS are those of Debian 12, and this is another system"

missing=()
need() { command -v "$1" >/dev/null 2>&1 || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need qemu-system-x86_64 qemu-system-x86
need cpio cpio
need depmod kmod
need make make
need gcc-12 gcc-12
need perl perl
[[ -e /usr/lib/x86_64-linux-gnu/libelf.so.1 ]] || missing+=(libelf1)
[[ -e /usr/include/stdio.h ]] || missing+=(libc6-dev)
[[ -e /usr/lib/qemu/virtiofsd ]] || missing+=(qemu-system-common)
{ [[ -x /bin/busybox ]] && ! ldd /bin/busybox >/dev/null 2>&1; } || missing+=(busybox-static)
if ((${#missing[@]})); then
  [[ $(id -u) == 0 ]] || fail "not root, and missing: ${missing[*]}"
  say "installing ${missing[*]} with apt-get"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# Begun anew each time: what an interrupted run has left is of no use.
work=$out/work
rm -rf "$work"
mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,tree,first/{bin,modules,tools/usr}}
trap 'rm -rf "$work"' EXIT

say "fetching the kernel and OpenZFS"
mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Identifier: Packages' |
  awk -v name="$VERSION_CODENAME" '$2 == name && $3 == "main" { print $1; exit }')
[[ $mirror ]] || fail "the host's sources of packages name no Debian $VERSION_CODENAME"
{
  cat /etc/apt/sources.list 2>/dev/null || true
  printf 'deb %s %s-backports contrib\n' "$mirror" "$VERSION_CODENAME"
} >"$work/sources.list"
cat >"$work/apt.conf" <<END
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list";
APT::Sandbox::User "root";
END
export APT_CONFIG=$work/apt.conf
apt-get update -qq
kernel=$(apt-cache depends linux-headers-cloud-amd64 | sed -n 's/.*Depends: linux-headers-\(.*\)-cloud-amd64$/\1/p' | head -1)
[[ $kernel ]] || fail "no headers of a cloud kernel are to be had"
from_backports=(zfs-dkms zfsutils-linux libzfs6linux libzpool6linux libnvpair3linux libuutil3linux)
(
  cd "$work/debs"
  apt-get download -qq "linux-image-$kernel-cloud-amd64" "linux-headers-$kernel-"{cloud-amd64,common} \
    "linux-kbuild-${kernel%.*}" "${from_backports[@]/%//$VERSION_CODENAME-backports}"
)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/tree"; done

tree=$work/tree
name=$kernel-cloud-amd64
source=$(echo "$tree"/usr/src/zfs-*)
sed -i "s|/usr/src|$tree/usr/src|" "$tree/usr/src/linux-headers-$name/Makefile"
say "building ${source##*/} for $name, which takes some minutes; $out/log tells more"
(
  cd "$source"
  ./configure --with-config=kernel --with-linux="$tree/usr/src/linux-headers-$kernel-common" \
    --with-linux-obj="$tree/usr/src/linux-headers-$name"
  make -j"$(nproc)"
) >"$out/log" 2>&1 </dev/null || fail "it could not be built, see $out/log"

first=$work/first
cp /bin/busybox "$first/bin/"
install -m 755 tests/openzfs/init "$first/init"
PATH="$PATH:/usr/sbin:/sbin"
depmod -b "$tree" "$name"
for module in virtio_pci virtiofs overlay loop; do
  modprobe -d "$tree" -S "$name" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/load"
printf '%s\n' "$source"/module/{spl,zfs}.ko >>"$work/load"
number=100
while read -r path; do
  cp "$path" "$first/modules/$((number++))-${path##*/}"
done <"$work/load"
strip --strip-debug "$first"/modules/*.ko
for part in {,usr/}{sbin,lib/x86_64-linux-gnu}; do  # on the host /sbin and /lib are links to those of /usr
  [[ -d $tree/$part ]] || continue
  mkdir -p "$first/tools/usr/${part#usr/}"
  cp -a "$tree/$part/." "$first/tools/usr/${part#usr/}/"
done
(cd "$first" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initramfs"
cp "$tree/boot/vmlinuz-$name" "$out/vmlinuz"
mv "$work/initramfs" "$out/initramfs"
say "ready: ${source##*/} on $name"
