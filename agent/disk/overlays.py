"""The directories that overlay mounts are made of, as containers have them: used without a process or a mount of them.

A directory is named as it was when the overlay was mounted: by a path in the namespace of whoever did that, which may
be that where the overlay is seen, or ours. Both are tried. A name that is not absolute (some give it from a working
directory that nobody else knows) says nothing, and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.disk.loops import Mount, mount_above, mounts_by_namespace, own_mounts, plain

_WRITTEN: Final = frozenset({"upperdir", "workdir"})
_ONE: Final = frozenset({"lowerdir+", "datadir+"})
_PART: Final = re.compile(r"(?:\\.|[^:\\])+", re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Layer:
    """A directory of the overlay at `point`: a path to it from here, and its device as mountinfo writes it."""

    point: str
    reach: Path
    device: str
    writes: bool


def layers() -> Iterator[Layer]:
    """Of every overlay in every mount namespace, the directories that can be found. Touches no file system."""
    for root, mounts in mounts_by_namespace():
        for mount in mounts:
            for name, writes in _named(mount.layers) if mount.layers else ():
                yield from _found(mount, name, writes, root, mounts)
                if root != Path("/"):
                    yield from _found(mount, name, writes, Path("/"), own_mounts())


def _named(options: str) -> Iterator[tuple[str, bool]]:
    """The paths in an overlay's options, and whether it writes there; commas within them are escaped in octal."""
    words = options.split(",")
    for word in words:
        key, _, value = word.partition("=")
        value = plain(value)
        if key in _WRITTEN:
            yield _ESCAPED.sub(r"\1", value), "ro" not in words
        elif key in _ONE:
            yield _ESCAPED.sub(r"\1", value), False
        elif key == "lowerdir":
            yield from ((_ESCAPED.sub(r"\1", part), False) for part in _PART.findall(value))


def _found(overlay: Mount, name: str, writes: bool, root: Path, mounts: list[Mount]) -> Iterator[Layer]:
    if not name.startswith("/"):
        return
    mount = mount_above(name, mounts)
    if mount is not None:
        yield Layer(overlay.point, root / name.lstrip("/"), mount.device, writes)
