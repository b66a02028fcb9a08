"""Where the demo stands: a temporary directory, a file system that shares extents if it can be had, and a volume.

As root, and with mkfs.xfs, an XFS on a sparse file is loop-mounted; else the images are plain sparse files wherever
the temporary directory is. The volume is an image with a real ext4 file system in it, made without mounting. Its
files are changed the way a guest changes them, in place, block by block: debugfs says where a file's blocks are.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from resilver.errors import DemoFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilver.cli.demo.cleanup import Cleanup

MIB: Final = 1 << 20
BLOCK: Final = 4096
VOLUME_BYTES: Final = 1 << 30
SPACE_BYTES: Final = 8 << 30
"""Of the XFS: a sparse file, of which the demo fills about a tenth."""
FREE_BYTES_MIN: Final = 4 << 30
"""Plain copies of 200 MiB of data: three live ones and up to six snapshots of each, with room to spare."""
RANDOM_FILES: Final = 6
RANDOM_FILE_BYTES: Final = 16 * MIB
TEXT_BYTES_MAX: Final = 24 * MIB
COMMAND_TIMEOUT_S: Final = 60.0
UNMOUNT_TIMEOUT_S: Final = 10.0
_SBIN: Final = "/usr/sbin:/sbin:/usr/local/sbin"


def failed(message: str) -> DemoFailed:
    return DemoFailed("DEMO_FAILED", message)


def tool(name: str) -> str | None:
    """Where a program is; system programs are found also by users without sbin on their PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def command(*words: str | Path, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program and waits; raises DemoFailed with what it said."""
    done = subprocess.run(
        [str(word) for word in words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if check and done.returncode != 0:
        raise failed(f"{' '.join(str(word) for word in words)}: {(done.stderr or done.stdout).strip()}")
    return done


@dataclass(frozen=True, slots=True)
class Ground:
    """`base` is the temporary directory, `space` where the nodes' disks are; `kind` says what that is, in words."""

    base: Path
    space: Path
    kind: str
    shares_extents: bool

    def image(self, node: str) -> Path:
        return self.space / node / "vm1.img"


def prepare(cleanup: Cleanup) -> Ground:
    """Makes the place; everything in it goes when the cleanup runs."""
    base = Path(tempfile.mkdtemp(prefix="resilver-demo-"))
    cleanup.add(f"remove {base}", partial(_remove, base))
    space = base / "disks"
    space.mkdir()
    why = _mount_xfs(base, space, cleanup)
    if why and shutil.disk_usage(base).free < FREE_BYTES_MIN:
        raise failed(f"{base} has less than {FREE_BYTES_MIN >> 30} GiB free; point TMPDIR at a larger file system")
    kind = f"plain sparse files ({why})" if why else "XFS on a loop device: snapshots share their blocks"
    return Ground(base, space, kind, shares_extents=not why)


def _remove(base: Path) -> None:
    if os.path.ismount(base / "disks"):
        raise OSError(f"{base}/disks is still mounted; unmount it and remove {base}")
    shutil.rmtree(base)


def _mount_xfs(base: Path, space: Path, cleanup: Cleanup) -> str:
    """Mounts an XFS at `space`; empty, or why not."""
    mkfs = tool("mkfs.xfs")
    if os.geteuid() != 0:
        return "not root, so nothing was mounted"
    if mkfs is None:
        return "mkfs.xfs is not installed"
    disk = base / "xfs.img"
    with disk.open("wb") as file:
        file.truncate(SPACE_BYTES)
    try:
        command(mkfs, "-q", "-m", "reflink=1", disk)
        # Said before it is done: a mount that was cut short by Ctrl-C is undone as well.
        cleanup.add(f"unmount {space}", partial(_unmount, space, disk))
        command("mount", "-o", "loop", disk, space)
    except (DemoFailed, OSError) as error:
        return f"XFS could not be mounted: {error}"
    return ""


def _unmount(space: Path, disk: Path) -> None:
    deadline = time.monotonic() + UNMOUNT_TIMEOUT_S
    while os.path.ismount(space):
        done = command("umount", space, check=False)
        if done.returncode == 0:
            continue
        if time.monotonic() > deadline:
            # Somebody is in there still: the mount goes when they do, and the path is free at once.
            command("umount", "-l", space)
            break
        # Nothing announces that a file system is no longer busy.
        time.sleep(0.2)
    losetup = tool("losetup")
    if losetup is not None:
        for line in command(losetup, "-j", disk, check=False).stdout.splitlines():
            command(losetup, "-d", line.split(":", 1)[0], check=False)


def make_volume(path: Path, base: Path, seed: random.Random) -> str:
    """Makes the image with a file system and files in it; what it is, in words."""
    content = base / "content"
    (content / "data").mkdir(parents=True)
    for number in range(RANDOM_FILES):
        (content / "data" / f"file{number}.bin").write_bytes(seed.randbytes(RANDOM_FILE_BYTES))
    count = RANDOM_FILES + _copy_texts(content / "src")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(VOLUME_BYTES)
    mkfs = tool("mkfs.ext4")
    if mkfs is None:
        raise failed("mkfs.ext4 is not installed; it is in e2fsprogs")
    command(mkfs, "-q", "-F", "-b", str(BLOCK), "-d", content, path)
    shutil.rmtree(content)
    return f"1 GiB with an ext4 file system and {count:,} files, {_allocated(path) // MIB} MiB in use"


def _copy_texts(target: Path) -> int:
    """Copies sources of Python's own library, real files of all sizes; how many."""
    source = Path(sysconfig.get_paths()["stdlib"])
    copied = count = 0
    for path in sorted(source.rglob("*.py")):
        size = path.stat().st_size
        if copied + size > TEXT_BYTES_MAX:
            break
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        copied += size
        count += 1
    return count


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def data_blocks(path: Path) -> list[int]:
    """The numbers of the 4 KiB blocks in which the random files lie."""
    debugfs = tool("debugfs")
    if debugfs is None:
        raise failed("debugfs is not installed; it is in e2fsprogs")
    asked = "\n".join(f"blocks /data/file{number}.bin" for number in range(RANDOM_FILES)) + "\n"
    said = command(debugfs, "-f", "-", path, stdin=asked).stdout
    return [int(word) for line in said.splitlines() if not line.startswith("debugfs") for word in line.split()]


def overwrite(path: Path, blocks: Sequence[int], seed: random.Random) -> int:
    """Writes new data over these blocks and closes the file; bytes written."""
    with path.open("r+b") as file:
        for block in sorted(blocks):
            file.seek(block * BLOCK)
            file.write(seed.randbytes(BLOCK))
        file.flush()
        os.fsync(file.fileno())
    return len(blocks) * BLOCK


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_system_is_clean(path: Path) -> bool | None:
    """What e2fsck says, read-only; None if it is not installed."""
    fsck = tool("e2fsck")
    return None if fsck is None else command(fsck, "-fn", path, check=False).returncode == 0
