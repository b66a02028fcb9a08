"""A snapshot or preserved copy as a directory tree of its own, at a path that does not exist yet.

On the same Btrfs it is a snapshot, made in one step. On another one it is a subvolume with the same content, elsewhere
a directory: copied by `cp`, with holes, hard links, ACLs and attributes, under another name, and renamed when it is
whole (`unfinished.py`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Final

from agent.backends import btrfs_send
from agent.backends.btrfs_layout import remove
from agent.disk import btrfs, ioctl
from agent.disk.durable import disk_errors
from agent.disk.unfinished import unfinished
from resilver.errors import Invalid

COPY_MAX_S: Final = 7 * 86400.0
SIZE_MAX_S: Final = 30.0


def export(source: Path, path: Path, *, writable: bool) -> int:
    """Its data in bytes, 0 if that is not known, or takes long. Only on Btrfs can it be kept from being written."""
    if os.path.lexists(path):
        raise Invalid("INVALID_FIELD", f"{path} is there already; name a path that is not", field="path")
    if not path.parent.is_dir():
        raise Invalid("INVALID_FIELD", f"{path.parent} is no directory; create it first", field="path")
    with disk_errors(path):
        if btrfs.is_btrfs(path.parent) and ioctl.fs_id(path.parent) == ioctl.fs_id(source):
            btrfs.snapshot(source, path, read_only=not writable)
            btrfs.sync(path.parent)
        else:
            _copy(source, path, writable=writable)
    return _size(source)


def _size(path: Path) -> int:
    """Only a read-only subvolume can be counted without being read. The export is there already: no error here."""
    with contextlib.suppress(OSError):
        if btrfs.is_subvolume(path) and btrfs.info(path).read_only:
            return btrfs_send.estimate(None, path, SIZE_MAX_S) or 0
    return 0


def _copy(source: Path, path: Path, *, writable: bool) -> None:
    subvolume = btrfs.is_btrfs(path.parent)
    make = btrfs.create if subvolume else _make_directory
    with unfinished(path, make, remove) as (temporary, lock):
        # `/.` copies what is in it and its own attributes; reflinks between subvolumes would be no copies.
        done = subprocess.run(
            ["cp", "-a", "--sparse=always", "--", f"{source}/.", str(temporary)],
            capture_output=True,
            timeout=COPY_MAX_S,
            check=False,
            env=btrfs_send.environment(),
            pass_fds=(lock,),
        )
        if done.returncode:
            raise btrfs_send.failed("cp failed", done.stderr.decode(errors="replace")[-500:].strip(), path)
        if subvolume and not writable:
            btrfs.set_read_only(temporary, read_only=True)
        with btrfs.opened_dir(path.parent) as fd:
            ioctl.syncfs(fd)
            ioctl.rename_new(temporary, path)
            os.fsync(fd)


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700)
