"""The stage: a writable thin snapshot of the base (or an empty thin volume) that is becoming the target.

Its directory is made under another name and renamed into place, so that a stage that is there is whole. Its size is the
target's from the start. Whatever the pool still maps beyond the base's end is given back first: a thin volume that was
made smaller and larger again reads there as it did before.
"""

from __future__ import annotations

import bisect
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from agent.backends import lvm_keep as keeping
from agent.backends.image_copy import fresh_dir
from agent.backends.lvm_delta import between
from agent.backends.lvm_place import Ref, View, load_ref, save_ref
from agent.backends.lvm_state import Found, Tools
from agent.delta import DeltaRange
from agent.disk import blockdev, contents, lvm
from agent.disk.durable import disk_errors, fsync_dir, make_dir, read_json, write_json
from agent.disk.lvm import Lv
from resilver.errors import Refused

_WINDOW_BYTES: Final = 1 << 20


class LvmStage:
    """An open stage; usable from several threads."""

    def __init__(self, tools: Tools, view: View, lv: Lv, *, base: str, target: str, resumed: bool) -> None:
        self.base = base
        self.target = target
        self.size_bytes = lv.size_bytes
        self.directory = tools.layout.stage
        self.resumed = resumed
        self._tools = tools
        self._view = view
        self._lv = lv
        self._chunk_bytes = tools.place.pool_lv(view).chunk_bytes
        self._mapped: tuple[list[int], list[int]] | None = None
        self._closing = threading.Lock()
        self._fd = _opened(lv)

    def write(self, offset: int, data: memoryview) -> None:
        with disk_errors(self._lv.path):
            contents.write_all(self._fd, offset, data)
        self._mapped = None

    def zero(self, offset: int, length: int) -> None:
        with disk_errors(self._lv.path):
            blockdev.zero(self._fd, offset, offset + length, self._chunk_bytes)
        self._mapped = None

    def sync(self) -> None:
        if self._fd < 0:  # closed by a commit that was refused: it was synced then
            return
        with disk_errors(self._lv.path):
            os.fsync(self._fd)

    def drop_cache(self) -> None:
        with disk_errors(self._lv.path):
            os.fsync(self._fd)
            blockdev.flush_cache(self._fd)
        self._mapped = self._look()

    def announce(self, ranges: Sequence[DeltaRange]) -> None:
        with disk_errors(self._lv.path):
            contents.announce(self._fd, ranges)

    def read_into(self, offset: int, view: memoryview) -> None:
        with disk_errors(self._lv.path):
            contents.read_exactly(self._fd, offset, view)

    def data_within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What the pool maps there: asked once, and again after something was written."""
        mapped = self._mapped
        if mapped is None:
            self.sync()
            mapped = self._mapped = self._look()
        starts, ends = mapped
        end = offset + length
        for row in range(max(0, bisect.bisect_right(ends, offset)), len(starts)):
            if starts[row] >= end:
                return
            low, high = max(starts[row], offset), min(ends[row], end)
            for at in range(low, high, _WINDOW_BYTES):
                yield at, min(_WINDOW_BYTES, high - at)

    def _look(self) -> tuple[list[int], list[int]]:
        """Where what the pool maps begins and ends; it maps what was synced."""
        found = between(self._tools.place.pool(self._view), None, self._lv, self._tools.step)
        return found.offsets.tolist(), (found.offsets + found.lengths).tolist()

    def close(self) -> None:
        with self._closing:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _opened(lv: Lv) -> int:
    """A descriptor that keeps others from mounting it; IN_USE if somebody has."""
    if lv.read_only:  # sealed for a commit that was refused
        lvm.deactivate(lv)
        lvm.lvm("lvchange", "-p", "rw", lv.full_name)
    device = lvm.activate(lv)
    with disk_errors(lv.path):
        try:
            return os.open(device.node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    who = ", ".join(user.name for user in blockdev.users_of(device.number)) or "something that cannot be seen"
    raise Refused("IN_USE", f"{lv.full_name}, which is being received, is in use by {who}", in_use_by=who)


def check_size(view: View, size_bytes: int, name: str) -> None:
    """A logical volume is a whole number of extents: a volume of another size cannot be mirrored to it exactly."""
    extent = view.group.extent_bytes
    if size_bytes % extent == 0 and size_bytes:
        return
    right = max(1, -(-size_bytes // extent)) * extent
    raise Refused(
        "NOT_SUPPORTED",
        f"the volume is {size_bytes:,} bytes long, and {name} can only be a whole number of extents of {extent:,}: "
        f"make the volume {right:,} bytes long (truncate -s {right}), and take a new consistency point",
        size_bytes=str(size_bytes),
        wanted_bytes=str(right),
    )


def open_stage(tools: Tools, found: Found, base: str, target: str, size_bytes: int) -> LvmStage:
    """The stage of that pair and size, gone on with if it is there; any other is discarded first."""
    layout = tools.layout
    check_size(found.view, size_bytes, tools.place.full_name)
    wanted = {"base": base, "target": target, "size_bytes": size_bytes}
    lv = found.view.find(load_ref(layout.tree / "data"))
    whole = lv is not None and read_json(layout.stage / "stage.json") == wanted
    if lv is None or not whole:
        discard(tools)
        with disk_errors(layout.stage):
            try:
                lv = _make(tools, found, base, target, size_bytes)
            except BaseException:
                keeping.throw_away(tools, layout.new("stage"))
                raise
    return LvmStage(tools, found.view, lv, base=base, target=target, resumed=whole)


def _make(tools: Tools, found: Found, base: str, target: str, size_bytes: int) -> Lv:
    layout, place, view = tools.layout, tools.place, found.view
    making = fresh_dir(layout.new("stage"))
    tree = making / "tree"
    make_dir(tree)
    name = place.new_name()
    save_ref(tree / "data", Ref(name))
    tools.step("stage.named")
    named = (f"resilver.id={target}",)
    if base:
        origin = place.snapshot(view, base, "BASE_GONE")
        lv = place.make_snapshot(view, origin, name, named, read_only=False)
    else:
        lv = place.make_empty(view, size_bytes, name, named)
    save_ref(tree / "data", Ref(name, lv.uuid))
    tools.step("stage.made")
    if lv.size_bytes != size_bytes:
        lv = _resized(tools, view, lv, size_bytes)
    write_json(making / "stage.json", {"base": base, "target": target, "size_bytes": size_bytes})
    fsync_dir(tree)
    making.rename(layout.stage)
    fsync_dir(layout.root)
    return lv


def _resized(tools: Tools, view: View, lv: Lv, size_bytes: int) -> Lv:
    """Another size, with zeros beyond the base's end; what is cut off is given back before it is out of reach."""
    old = lv.size_bytes
    chunk = tools.place.pool_lv(view).chunk_bytes
    if size_bytes < old:
        _zero(lv, size_bytes, old, chunk)
    lvm.lvm("lvresize", "-y", "-f", "-L", f"{size_bytes}b", lv.full_name)
    lv = tools.place.again(view, lv.name)
    if lv.size_bytes != size_bytes:
        raise Refused("NOT_SUPPORTED", f"LVM made {lv.full_name} {lv.size_bytes} bytes long instead of {size_bytes}")
    if size_bytes > old:
        _zero(lv, old, size_bytes, chunk)
    return lv


def _zero(lv: Lv, start: int, end: int, chunk_bytes: int) -> None:
    node = lvm.activate(lv).node
    with disk_errors(node):
        fd = os.open(node, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        try:
            blockdev.zero(fd, start, end, chunk_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)


def discard(tools: Tools) -> None:
    """Removes the stage, in one step as far as anybody can see."""
    layout = tools.layout
    with disk_errors(layout.stage):
        gone = layout.trash("stage")
        keeping.throw_away(tools, gone)
        try:
            layout.stage.rename(gone)
        except FileNotFoundError:
            return
        fsync_dir(layout.root)
        keeping.throw_away(tools, gone)
