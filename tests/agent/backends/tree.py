"""Trees of files for the tests of file-system volumes: made and changed by a seed, and compared as a user would.

A tree has what real ones have: directories, empty and deep; names with spaces, newlines, unicode and bytes that are no
text; symbolic links, hard links, FIFOs, device nodes; holes; owners, modes with their special bits, times in
nanoseconds; extended attributes and access control lists. A manifest names all of it for each path. Not compared:
access and change times, and where holes are.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat as modes
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

XATTRS, ACLS, NODES = "xattrs", "acls", "nodes"
ALL = frozenset({XATTRS, ACLS, NODES})

NAMES = (
    "plain",
    "with space",
    "Gr\u00fc\u00dfe \u2116 1",
    "new\nline",
    os.fsdecode(b"no text \xff\xfe"),
    "-dash",
    "tab\there",
    "x" * 200,
)
HOLE = 1 << 20
EPOCH_NS = 1_700_000_000 * 10**9


def create(top: Path, seed: int, features: frozenset[str] = ALL) -> None:
    """Fills an empty tree: about a MiB in about a hundred entries."""
    chance = random.Random(seed)
    for number, name in enumerate(NAMES):
        folder = top / f"d-{seed % 7}-{name}"
        (folder / "empty").mkdir(parents=True)
        for count in range(8):
            (folder / f"{count} {name}").write_bytes(chance.randbytes(chance.randrange(0, 25_000)))
        (folder / "link").symlink_to(f"../{name}")
        (folder / "dangling").symlink_to(os.fsdecode(b"nowhere/\xff"))
        (folder / "hard").hardlink_to(folder / f"0 {name}")
        (top / f"hard-{number}").hardlink_to(folder / f"0 {name}")
        os.chown(folder / f"1 {name}", 1000 + number, 2000 + number)
        (folder / f"2 {name}").chmod(0o4711)
    top.joinpath(*["deep"] * 12).mkdir(parents=True)
    _sparse(top / "sparse", chance)
    _specials(top, features)
    for path in sorted(_entries(top), reverse=True):
        os.utime(path, ns=(EPOCH_NS, EPOCH_NS + chance.randrange(10**15)), follow_symlinks=False)
    os.utime(top, ns=(EPOCH_NS, EPOCH_NS + chance.randrange(10**15)))


def edit(top: Path, seed: int) -> None:
    """One small change: a file of its own for seeds 0 to 15, and a new size and content for each seed."""
    (top / f"edited-{seed % 16}").write_bytes(random.Random(seed).randbytes(1000 + seed))


def change(top: Path, seed: int, features: frozenset[str] = ALL) -> None:
    """About twenty changes of every sort, all over the tree."""
    chance = random.Random(seed)
    sorts = [sort for sort, needs in CHANGES.items() if needs in {"", *features}]
    for number in range(20):
        entries = list(_entries(top))
        files = [path for path in entries if modes.S_ISREG(path.lstat().st_mode)]
        folders = [path for path in entries if modes.S_ISDIR(path.lstat().st_mode)]
        folder = chance.choice(folders or [top])
        new = folder / f"new {seed}-{number} {chance.choice(NAMES)[:20]}"
        if files:
            chance.choice(sorts)(Spot(top, chance.choice(files), folder, new, chance))
        else:
            new.write_bytes(chance.randbytes(9000))


@dataclass(frozen=True)
class Spot:
    """Where a change happens: a file, a directory other than the top where there is one, and a name that is free."""

    top: Path
    file: Path
    folder: Path
    new: Path
    chance: random.Random


def _make(spot: Spot) -> None:
    spot.new.write_bytes(spot.chance.randbytes(spot.chance.randrange(0, 50_000)))


def _make_folder(spot: Spot) -> None:
    spot.new.mkdir()


def _remove(spot: Spot) -> None:
    spot.file.unlink()


def _rename(spot: Spot) -> None:
    spot.file.rename(spot.new)


def _link(spot: Spot) -> None:
    spot.new.hardlink_to(spot.file)


def _overwrite(spot: Spot) -> None:
    _write_at(spot.file, spot.chance.randrange(0, 100_000), spot.chance.randbytes(5000))


def _truncate(spot: Spot) -> None:
    os.truncate(spot.file, spot.chance.randrange(0, 30_000))


def _own(spot: Spot) -> None:
    os.chown(spot.file, spot.chance.randrange(3000), spot.chance.randrange(3000))
    spot.file.chmod(spot.chance.choice([0o640, 0o4755, 0o600]))


def _date(spot: Spot) -> None:
    os.utime(spot.file, ns=(EPOCH_NS, EPOCH_NS + spot.chance.randrange(10**12)))


def _remove_folder(spot: Spot) -> None:
    if spot.folder != spot.top:
        shutil.rmtree(spot.folder)


def _move_folder(spot: Spot) -> None:
    """A directory moves with all that is in it."""
    if spot.folder != spot.top:
        spot.folder.rename(spot.top / f"moved {spot.new.name}")


def _mark(spot: Spot) -> None:
    os.setxattr(spot.file, "user.mark", spot.chance.randbytes(spot.chance.randrange(1, 500)))


def _grant(spot: Spot) -> None:
    os.setxattr(spot.folder, "system.posix_acl_default", acl(spot.chance.randrange(1, 5000)))


CHANGES: dict[Callable[[Spot], None], str] = {
    _make: "",
    _make_folder: "",
    _remove: "",
    _rename: "",
    _link: "",
    _overwrite: "",
    _truncate: "",
    _own: "",
    _date: "",
    _remove_folder: "",
    _move_folder: "",
    _mark: XATTRS,
    _grant: ACLS,
}
"""Every sort of change, and what of ALL it needs."""


def one_change(top: Path, sort: Callable[[Spot], None], seed: int = 1) -> None:
    """One change of one sort, to a file that is at least a page long and a directory that is not empty."""
    chance = random.Random(seed)
    files = [path for path in _entries(top) if path.is_file() and not path.is_symlink() and path.stat().st_size > 4096]
    file = chance.choice(files)
    sort(Spot(top, file, file.parent, file.parent / f"quite new {seed}", chance))


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _sparse(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")
    _write_at(path, HOLE, chance.randbytes(30_000))
    _write_at(path, 4 * HOLE, chance.randbytes(100))
    os.truncate(path, 5 * HOLE + 77)


def _specials(top: Path, features: frozenset[str]) -> None:
    os.mkfifo(top / "fifo", 0o640)
    if NODES in features:
        os.mknod(top / "null", modes.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(top / "disk", modes.S_IFBLK | 0o660, os.makedev(7, 250))
    plain = top / "attributes"
    plain.write_bytes(b"has some")
    top.chmod(0o751)
    if XATTRS in features:
        os.setxattr(plain, "user.text", "Gr\u00fc\u00dfe".encode())
        os.setxattr(plain, "user.bytes", bytes(range(256)))
        os.setxattr(plain, "trusted.secret", b"root's")
        os.setxattr(plain, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
        os.setxattr(top, "user.root", b"of the tree")
    if ACLS in features:
        os.setxattr(plain, "system.posix_acl_access", acl(1234))
        (top / "listed").mkdir()
        os.setxattr(top / "listed", "system.posix_acl_default", acl(4321))


def acl(uid: int) -> bytes:
    """`u::rw-,u:<uid>:r-x,g::r--,m::rwx,o::---`, as the kernel keeps it."""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 5, uid), (4, 4, nobody), (16, 7, nobody), (32, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _entries(top: Path) -> Iterator[Path]:
    """Everything below, in an order that is the same for equal trees."""
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted([*folders, *files]):
            yield Path(folder, name)


def manifest(top: Path) -> str:
    """The tree as text, a line for each path; equal texts are equal trees."""
    groups: dict[tuple[int, int], int] = {}
    return "\n".join(_line(path, top, groups) for path in (top, *_entries(top)))


def _line(path: Path, top: Path, groups: dict[tuple[int, int], int]) -> str:
    """Hard links are told by the order of their groups' first paths."""
    stat = path.lstat()
    kind = modes.S_IFMT(stat.st_mode)
    what = ""
    if kind == modes.S_IFREG:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:24]
        group = groups.setdefault((stat.st_dev, stat.st_ino), len(groups)) if stat.st_nlink > 1 else "-"
        what = f"{stat.st_size} {digest} links={stat.st_nlink}/{group}"
    elif kind == modes.S_IFLNK:
        what = repr(os.fsencode(path.readlink()))
    elif kind in {modes.S_IFCHR, modes.S_IFBLK}:
        what = f"{os.major(stat.st_rdev)}:{os.minor(stat.st_rdev)}"
    name = repr(os.fsencode(path.relative_to(top)))
    return f"{name} {stat.st_mode:o} {stat.st_uid}:{stat.st_gid} {stat.st_mtime_ns} {what} {_xattrs(path)}"


def _xattrs(path: Path) -> str:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError:
        return ""
    return " ".join(f"{name}={os.getxattr(path, name, follow_symlinks=False).hex()}" for name in names)
