"""The disk that the machine starts from: this very interpreter, its packages and the tools that tests need.

Every file keeps the path that it has on the host, so that a virtual environment works unchanged; libraries are found
with `ldd`, kernel modules in `modules.dep`. The image is an ext4 file system made by `mkfs.ext4 -d`, kept in a cache
under a name made of what is in it; only the project itself comes anew with every run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

TOOLS: Final = (
    "sh", "bash", "cat", "cp", "mv", "rm", "ls", "ln", "mkdir", "mknod", "rmdir", "stat", "tar", "tee", "cmp", "dd",
    "sync", "sleep", "env", "true", "mount", "umount", "findmnt", "switch_root", "losetup", "blkdiscard", "blockdev",
    "blkid", "mkswap", "swapon", "swapoff", "insmod", "modprobe", "lvm", "dmsetup", "thin_delta", "thin_dump",
    "thin_check", "mkfs.xfs", "mkfs.ext4", "tune2fs",
)  # fmt: skip
MODULES: Final = (
    "virtio_pci",
    "virtio_blk",
    "dm_thin_pool",
    "dm_snapshot",
    "xfs",
    "loop",
    "crc32c_generic",
    "libcrc32c",
)
FIRST_MODULES: Final = ("virtio_pci", "virtio_blk")
PACKAGES: Final = ("resilver", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
LVM_COMMANDS: Final = (
    "pvcreate", "vgcreate", "vgchange", "vgrename", "vgremove", "vgs", "lvcreate", "lvchange", "lvconvert", "lvs",
    "lvrename", "lvresize", "lvremove",
)  # fmt: skip
SPARE_BYTES: Final = 96 << 20
KERNELS: Final = (Path(__file__).parents[2] / ".tools" / "kernel", Path("/"))

_UNWANTED: Final = frozenset(
    {"test", "idlelib", "tkinter", "lib2to3", "ensurepip", "__pycache__", "site-packages", "dist-packages"}
)
_PATH: Final = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])

LVM_CONF: Final = """\
devices { obtain_device_list_from_udev=0 external_device_info_source="none" use_devicesfile=0 scan_lvs=0
    filter=["a|^/dev/vdd$|", "r|.*|"] }
activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0
    reserved_memory=256 reserved_stack=64 }
global { use_lvmpolld=0 event_activation=0 }
backup { backup=0 archive=0 }
"""

FIRST_INIT: Final = """\
#!/bin/sh
export PATH=/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev
for module in @MODULES@; do insmod "/modules/$module"; done
mount -t ext4 -o noatime /dev/vda /newroot
mkdir -p /proc /sys /run
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
exec switch_root /newroot /machine-init
"""

INIT: Final = """\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root TMPDIR=/dev/shm PYTHONUTF8=1
mkdir -p /dev/shm /dev/mapper
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -s /proc/self/fd /dev/fd
modprobe -a dm_thin_pool dm_snapshot loop
mkdir -p /results
tar xf /dev/vdb -C /
bash -c "set -o pipefail; sh /task/run </dev/null 2>&1 | tee /results/output >/dev/ttyS0"
echo $? >/results/status
tar cf /dev/vdc -C /results .
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


class Missing(Exception):
    """The machine cannot be made on this host; the message says what to install."""


class Kernel:
    """A kernel with the modules that the machine needs, in /boot or unpacked beside the project."""

    def __init__(self, image: Path, modules: Path) -> None:
        self.image = image
        self.modules = modules
        self._depends = dict(_dependencies(modules / "modules.dep"))

    @classmethod
    def find(cls) -> Kernel:
        for root in KERNELS:
            for image in sorted((root / "boot").glob("vmlinuz-*"), key=_numbers, reverse=True):
                release = image.name.removeprefix("vmlinuz-")
                found = [place / release for place in (root / "lib/modules", root / "usr/lib/modules")]
                modules = next((place for place in found if (place / "modules.dep").exists()), None)
                if modules is not None and os.access(image, os.R_OK):
                    made = cls(image, modules)
                    if made.has("dm_thin_pool") and made.has("virtio_blk"):
                        return made
        raise Missing("no kernel with dm-thin-pool: install linux-image-cloud-amd64, or run deploy/setup.sh as root")

    def has(self, name: str) -> bool:
        return name in self._depends or self._built_in(name)

    def _built_in(self, name: str) -> bool:
        listed = (self.modules / "modules.builtin").read_text()
        return f"/{name}.ko" in listed.replace("-", "_")

    def closure(self, names: Iterable[str]) -> list[Path]:
        """The files of these modules and of what they need, in the order in which they can be loaded."""
        found: dict[str, None] = {}
        for name in names:
            if name in self._depends:
                path, needs = self._depends[name]
                found.update(dict.fromkeys([*reversed(needs), path]))
        return [self.modules / path for path in found]


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _dependencies(path: Path) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    for line in path.read_text().splitlines():
        module, _, needs = line.partition(":")
        name = Path(module).name.split(".ko")[0].replace("-", "_")
        yield name, (module, needs.split())


def tool(name: str) -> Path:
    """Where a command is, as it is called."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise Missing(f"{name} is not installed; run deploy/setup.sh as root")
    return Path(found)


def _at(path: Path) -> Path:
    """The path with all its directories resolved: the image has no links among directories but the usual four."""
    return Path(os.path.realpath(path.parent)) / path.name


def _links(path: Path) -> Iterator[Path]:
    """A file and every link that leads to it."""
    for _ in range(20):
        yield _at(path)
        if not path.is_symlink():
            return
        path = _at(path).parent / path.readlink()


def _libraries(paths: Iterable[Path]) -> set[Path]:
    """What the loader would load for these programs and extension modules."""
    done = subprocess.run(["ldd", *map(str, paths)], capture_output=True, text=True, timeout=120, check=False)
    words = {word for word in done.stdout.split() if word.startswith("/") and ".so" in word and not word.endswith(":")}
    return {link for word in words for link in _links(Path(word))}


def _tree(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _UNWANTED and not name.startswith("config-")]
        yield from (Path(directory) / name for name in files)


def _packages() -> Iterator[importlib.metadata.Distribution]:
    """The distributions that the project and its tests need, by what they require."""
    from packaging.requirements import Requirement

    wanted, seen = list(PACKAGES), set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for line in found.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        yield found


def _package_files(package: importlib.metadata.Distribution) -> Iterator[Path]:
    for file in package.files or ():
        path = Path(str(file.locate()))
        if "site-packages" in path.parts:
            yield path


def _python() -> Iterator[Path]:
    yield from _links(Path(sys.executable))
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists():
        yield config
    for name in ("stdlib", "platstdlib"):
        yield from _tree(Path(sysconfig.get_path(name)))
    for package in _packages():
        yield from _package_files(package)


def key(kernel: Kernel) -> str:
    """What tells one image from another: the programs, the packages' versions, the kernel and this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in (*map(tool, TOOLS), Path(sys.executable), kernel.image, kernel.modules / "modules.dep"):
        found = path.stat()
        digest.update(f"{path} {os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}\n".encode())
    for package in sorted(f"{package.name} {package.version} {package.locate_file('')}" for package in _packages()):
        digest.update(f"{package}\n".encode())
    return digest.hexdigest()[:24]


def contents(kernel: Kernel) -> dict[Path, Path]:
    """Path in the image to the file on the host."""
    files = {path for path in _python() if path.is_file()}
    for name in TOOLS:
        files.update(_links(tool(name)))
    binaries = [path for path in files if path.suffix == ".so" or ".so." in path.name or "bin" in path.parent.name]
    files |= _libraries(binaries)
    made = {_at(path): path for path in files}
    release = kernel.modules.name
    for path in (*kernel.closure(MODULES), *kernel.modules.glob("modules.*")):
        made[Path("/usr/lib/modules") / release / path.relative_to(kernel.modules)] = path
    return made


def base_image(kernel: Kernel, cache: Path) -> Path:
    """The image, made unless the cache has it; of others the newest three stay."""
    image = cache / f"base-{key(kernel)}.ext4"
    if image.exists():
        os.utime(image)
        return image
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        tree, made = Path(work) / "tree", Path(work) / "image"
        size = _stage(contents(kernel), tree)
        size += compile_below(tree, Path("/"))
        with made.open("wb") as file:
            file.truncate((size * 5 // 4 + SPARE_BYTES) >> 20 << 20)
        mkfs = [str(tool("mkfs.ext4")), "-q", "-F", "-O", "^has_journal", "-m", "0", "-d", str(tree), str(made)]
        subprocess.run(mkfs, check=True, timeout=300, capture_output=True)
        for old in sorted(cache.glob("base-*.ext4"), key=lambda path: path.stat().st_mtime)[:-3]:
            old.unlink(missing_ok=True)
        made.rename(image)
    return image


def compile_below(tree: Path, prefix: Path) -> int:
    """Compiles what will be found at another path, which takes ten times longer in there; the bytes that came."""
    words = ["-q", "-q", "-j", "2", "-s", str(tree), "-p", str(prefix), "--invalidation-mode", "unchecked-hash"]
    command = [sys.executable, "-m", "compileall", *words, str(tree)]
    subprocess.run(command, check=False, timeout=300, capture_output=True)  # some packages hold what cannot be compiled
    return sum(path.stat().st_size + 4096 for path in tree.rglob("*.pyc"))


def _stage(files: dict[Path, Path], tree: Path) -> int:
    """Lays the files out below a directory; how many bytes they take."""
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "mnt", "etc/lvm", "var/lib", "usr/bin", "usr/sbin"):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(exist_ok=True)
        (tree / name).symlink_to(f"usr/{name}")
    total = 0
    for target, source in files.items():
        place = tree / str(target).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place, follow_symlinks=False)
        total += -(-source.lstat().st_size // 4096) * 4096 + 512
    for name in LVM_COMMANDS:
        (tree / "usr/sbin" / name).unlink(missing_ok=True)
        (tree / "usr/sbin" / name).symlink_to("lvm")
    (tree / "etc/lvm/lvm.conf").write_text(LVM_CONF)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tree / "machine-init").write_text(INIT)
    (tree / "machine-init").chmod(0o755)
    return total


def initramfs(kernel: Kernel) -> bytes:
    """What the kernel starts with: enough to find the image's disk."""
    programs = [tool(name) for name in ("sh", "mkdir", "mount", "insmod", "switch_root")]
    files = {link for program in programs for link in _links(program)} | _libraries(programs)
    modules = kernel.closure(FIRST_MODULES)
    archive = _Archive()
    for name in ("dev", "newroot", "modules", "usr"):
        archive.directory(name)
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    for path in sorted(files):
        archive.file(str(path).lstrip("/"), path)
    for path in modules:
        archive.file(f"modules/{path.name}", path)
    archive.add(
        "init", stat.S_IFREG | 0o755, FIRST_INIT.replace("@MODULES@", " ".join(p.name for p in modules)).encode()
    )
    return archive.finish()


class _Archive:
    """A cpio archive in the "newc" format, which is the one that the kernel reads."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._number = 0
        self._made: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._number += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        raw = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        self._pad()
        self._out.write(data)
        self._pad()

    def directory(self, name: str) -> None:
        if name not in self._made:
            self._made.add(name)
            self.add(name, stat.S_IFDIR | 0o755)

    def link(self, name: str, target: str) -> None:
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def file(self, name: str, source: Path) -> None:
        for parent in reversed(Path(name).parents[:-1]):
            self.directory(str(parent))
        if source.is_symlink():
            self.link(name, str(source.readlink()))
        else:
            self.add(name, stat.S_IFREG | 0o755, source.read_bytes())

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _pad(self) -> None:
        self._out.write(b"\0" * (-self._out.tell() % 4))
