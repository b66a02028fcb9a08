"""The stage: a writable clone of the base (or nothing) that is becoming the target.

It is made under another name and renamed into place, so that a stage that is there is whole. Its size is the target's
from the start: grown by a hole, or cut.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from agent.backends.image_copy import Copier, create, fresh_dir, opened, remove_tree
from agent.backends.image_layout import Layout
from agent.backends.image_scratch import Scratch
from agent.backends.image_untouched import check_untouched
from agent.delta import DeltaRange
from agent.disk import contents, ioctl
from agent.disk.durable import disk_errors, fsync_dir, make_dir, read_json, write_json
from resilver.errors import Refused

_ZEROS: Final = memoryview(bytes(1 << 20))


class ImageStage:
    """An open stage; usable from several threads."""

    def __init__(self, layout: Layout, base: str, target: str, size_bytes: int, *, resumed: bool, shares: bool) -> None:
        self.base = base
        self.target = target
        self.size_bytes = size_bytes
        self.directory = layout.stage
        self.resumed = resumed
        self._path = layout.tree / "data"
        self._closing = threading.Lock()
        with disk_errors(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                # What is written where nothing was shared costs no exchange.
                scratch = base and shares and ioctl.fs_magic(self._fd) == ioctl.XFS_MAGIC
                self._scratch = Scratch(self.directory, self._fd) if scratch else None
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, offset: int, data: memoryview) -> None:
        with disk_errors(self._path):
            scratch = self._settled(offset, len(data))
            if scratch is not None and scratch.takes(offset, len(data)):
                scratch.write(offset, data)
            else:
                contents.write_all(self._fd, offset, data)

    def zero(self, offset: int, length: int) -> None:
        with disk_errors(self._path):
            self._settled(offset, length)
            try:
                ioctl.punch_hole(self._fd, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                for at in range(offset, offset + length, len(_ZEROS)):
                    contents.write_all(self._fd, at, _ZEROS[: offset + length - at])

    def _settled(self, offset: int, length: int) -> Scratch | None:
        """Of two writes to one place the later one counts."""
        scratch = self._scratch
        if scratch is not None:
            scratch.settle(offset, length)
        return scratch

    def sync(self) -> None:
        with disk_errors(self._path):
            if self._scratch is not None:
                self._scratch.place()
            os.fdatasync(self._fd)

    def drop_cache(self) -> None:
        self.sync()
        with disk_errors(self._path):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        with disk_errors(self._path):
            contents.announce(self._fd, ranges)

    def read_into(self, offset: int, view: memoryview) -> None:
        with disk_errors(self._path):
            contents.read_exactly(self._fd, offset, view)

    def data_within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        with disk_errors(self._path):
            yield from contents.data_windows((self._fd,), offset, offset + length)

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to the file that this stage writes, and not to one that somebody put there."""
        try:
            return os.path.samestat(path.lstat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        with self._closing:
            fd, self._fd = self._fd, -1
            scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()
        if fd >= 0:
            os.close(fd)


def open_stage(layout: Layout, copier: Copier, base: str, target: str, size_bytes: int) -> ImageStage:
    """The stage of that pair and size, gone on with if it is there; any other is discarded first."""
    wanted = {"base": base, "target": target, "size_bytes": size_bytes}
    found = read_json(layout.stage / "stage.json")
    whole = found == wanted and (layout.tree / "data").exists()
    if not whole:
        discard(layout)
        with disk_errors(layout.stage):
            try:
                _make(layout, copier, base, target, size_bytes)
            except BaseException:
                remove_tree(layout.new("stage"))
                raise
    return ImageStage(layout, base, target, size_bytes, resumed=whole, shares=copier.reflink)


def _make(layout: Layout, copier: Copier, base: str, target: str, size_bytes: int) -> None:
    making = fresh_dir(layout.new("stage"))
    tree = making / "tree"
    make_dir(tree)
    fd = create(tree / "data")
    try:
        if base:
            _fill_from(layout, copier, base, fd)
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
    finally:
        os.close(fd)
    write_json(making / "stage.json", {"base": base, "target": target, "size_bytes": size_bytes})
    fsync_dir(tree)
    making.rename(layout.stage)
    fsync_dir(layout.root)


def _fill_from(layout: Layout, copier: Copier, base: str, fd: int) -> None:
    check_untouched(layout.snapshot(base))
    try:
        with opened(layout.data(base)) as base_fd:
            copier.fill(base_fd, fd, None)
    except FileNotFoundError:
        raise Refused("BASE_GONE", f"the data of snapshot {base} is not on this node") from None


def discard(layout: Layout) -> None:
    """Removes the stage, in one step as far as anybody can see."""
    with disk_errors(layout.stage):
        gone = layout.trash("stage")
        remove_tree(gone)
        try:
            layout.stage.rename(gone)
        except FileNotFoundError:
            return
        fsync_dir(layout.root)
        remove_tree(gone)
