"""Volumes with files, as people have them: made, changed in every way, and compared by rsync, which knows not of us.

Contents come from a seeded generator, so that a failure can be looked at again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from pathlib import Path

MIB = 1 << 20
SOURCES = ("agent", "coordinator", "resilver", "tests", "docs")
HERE = Path(__file__).parents[2]


def make(root: Path, *, small_files: int = 2_000, seed: int = 1) -> set[str]:
    """A source tree, many small files, holes, links and attributes; the kinds of things that this file system has."""
    source = random.Random(seed)
    for name in SOURCES:
        shutil.copytree(HERE / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
    _small(root / "small", small_files, source)
    with (root / "holes.img").open("wb") as file:
        file.truncate(512 * MIB)
        for at in range(0, 512 * MIB, 64 * MIB):
            file.seek(at + 4096)
            file.write(source.randbytes(200_000))
    (root / "big.bin").write_bytes(source.randbytes(24 * MIB))
    (root / "Überschrift mit Leerzeichen").mkdir()
    (root / "Überschrift mit Leerzeichen" / "日本語 \t\n.txt").write_text("names are bytes")
    (root / "hard link").hardlink_to(root / "big.bin")
    (root / "soft link").symlink_to("source/agent")
    os.mkfifo(root / "fifo")
    os.chown(root / "holes.img", 1234, 4321)
    (root / "holes.img").chmod(0o4750)
    return _attributes(root)


def _small(directory: Path, count: int, source: random.Random) -> None:
    for number in range(count):
        place = directory / f"{number // 1000:03}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        (place / f"{number:06}.dat").write_bytes(source.randbytes(source.randrange(1, 6_000)))


def _attributes(root: Path) -> set[str]:
    there = set()
    with contextlib.suppress(OSError):
        os.setxattr(root / "big.bin", "user.colour", b"blue\0green")
        there.add("xattr")
    acl = ["setfacl", "-m", "u:1234:rw,g:4321:r", str(root / "source" / "agent" / "node.py")]
    if subprocess.run(acl, capture_output=True, check=False).returncode == 0:
        there.add("acl")
    return there


def change(root: Path, seed: int) -> None:
    """A little of everything that happens to files."""
    source = random.Random(seed)
    with (root / "holes.img").open("r+b") as file:
        for _ in range(20):
            file.seek(source.randrange(512 * MIB // 4096) * 4096)
            file.write(source.randbytes(4096))
    with (root / "big.bin").open("r+b") as file:
        file.seek(source.randrange(20 * MIB))
        file.write(source.randbytes(MIB))
    small = sorted((root / "small").rglob("*.dat"))
    for path in source.sample(small, 30):
        path.unlink()
    for path in source.sample(sorted((root / "small").rglob("*.dat")), 30):
        path.write_bytes(source.randbytes(3_000))
    for path in source.sample(sorted((root / "small").rglob("*.dat")), 10):
        path.rename(path.with_name(f"renamed-{seed}-{path.name}"))
    for name in sorted(path.name for path in (root / "source").iterdir())[:2]:
        if not name.startswith("moved"):
            (root / "source" / name).rename(root / "source" / f"moved-{seed}-{name}")
    fresh = root / f"new-{seed}"
    (fresh / "below").mkdir(parents=True)
    (fresh / "below" / "text").write_text("new\n" * source.randrange(1, 10_000))
    (fresh / "another link").hardlink_to(root / "big.bin")
    os.truncate(root / "big.bin", 24 * MIB + source.randrange(MIB))
    with contextlib.suppress(OSError):
        os.setxattr(fresh, f"user.seed{seed}", str(seed).encode())
    (root / "source").chmod(0o711)


def differences(one: Path, other: Path) -> str:
    """What rsync would do to make the second like the first, by contents: nothing, if they are the same."""
    done = subprocess.run(
        ["rsync", "-nacAXH", "--delete", "--itemize-changes", f"{one}/", f"{other}/"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
