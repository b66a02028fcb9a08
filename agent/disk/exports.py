"""What the kernel's NFS server exports: by its clients' hands a file is open in no process.

A table of `exportfs` and one of the kernel are read, which say the same where both are there. A subvolume of Btrfs is
no mount point: an export of any directory above it, on the same file system, shows it. What is mounted below an export
is shown with `crossmnt` only, or by an export of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk.loops import is_within, plain

TABLES: Final = (Path("/var/lib/nfs/etab"), Path("/proc/fs/nfsd/exports"))


@dataclass(frozen=True, slots=True)
class Export:
    """A directory that is exported; `crosses`: with what is mounted below it."""

    path: str
    writes: bool
    crosses: bool


def exports() -> Iterator[Export]:
    """All of them, one that several clients have several times, and as often as a table names it."""
    for table in TABLES:
        try:
            raw = table.read_bytes()
        except OSError:
            continue
        for line in raw.decode(errors="surrogateescape").split("\n"):
            name, tab, clients = line.partition("\t" if "\t" in line else " ")
            if name and not name.startswith("#"):
                # Without options it is not a table of today's: the more dangerous is assumed.
                words = clients.replace("(", ",").replace(")", ",").split(",") if tab else []
                yield Export(plain(name), "rw" in words or "ro" not in words, "crossmnt" in words)


def reaching(point: str) -> Iterator[Export]:
    """Those that show a mount at a place, or a directory in it."""
    for export in exports():
        if is_within(export.path, point) or (export.crosses and is_within(point, export.path)):
            yield export
