"""Brings what is mounted from a file to rest, for the moment of a clone.

A file that a loop device stands on lacks what its mount has not yet written. Each mount is frozen by a helper process
(`freeze.py`); where it cannot be frozen, it is synced; an attached device without a mount is flushed. What is frozen is
written down first, so that the agent can thaw it at its next start even if the helper was killed too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from agent.disk import freeze, ioctl, loops
from agent.disk.durable import read_json, remove_file, write_json
from resilver.lineage import Consistency

FREEZE_MAX_S: Final = 10.0
_ANSWER_MAX_S: Final = 30.0


class _Helper:
    """One freeze helper, whose mount is frozen."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, mount: Path, deadline_s: float) -> _Helper | None:
        """Freezes a mount; None if it cannot be frozen, or somebody else has done so."""
        command = [sys.executable, "-I", "-S", freeze.__file__, str(mount), str(deadline_s)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        helper = cls(process)
        if process.stdout.readline() == b"frozen\n":
            return helper
        helper.thaw()
        return None

    def thaw(self) -> bool:
        """Ends the freeze; True if it had held until now."""
        try:
            out, _ = self._process.communicate(timeout=_ANSWER_MAX_S)
        except subprocess.TimeoutExpired:
            return False
        return b"thawed\n" in out


class Quiesced:
    """What came of it: `consistency` is final once the block has ended."""

    def __init__(self) -> None:
        self.consistency = Consistency.CRASH


@contextlib.contextmanager
def quiesced(
    stat: os.stat_result, record: Path, *, others_write: bool, deadline_s: float = FREEZE_MAX_S, may_freeze: bool = True
) -> Iterator[Quiesced]:
    """Brings the mounts upon a file to rest around the block.

    `record` is where the frozen mounts are written down; `others_write`: somebody besides loop devices may write,
    so that the best that can be had is what a power cut would leave.
    """
    result = Quiesced()
    attached = loops.loops_on(stat)
    mounts = [mount for loop in attached if not loop.read_only for mount in loops.mounts_of(loop)]
    helpers: list[_Helper] = []
    at_rest = held = True
    try:
        if may_freeze and mounts:
            write_json(record, {"mounts": [str(mount.reach) for mount in mounts]})
        for mount in mounts:
            helper = _Helper.start(mount.reach, deadline_s) if may_freeze else None
            if helper is not None:
                helpers.append(helper)
            else:
                at_rest = _flushed(mount.reach, ioctl.syncfs) and at_rest
        for loop in attached:
            at_rest = _flushed(loop.device, os.fsync) and at_rest
        yield result
    finally:
        for helper in helpers:
            held = helper.thaw() and held
        if may_freeze and mounts:
            remove_file(record)
    if attached and at_rest and not others_write:
        frozen = bool(mounts) and len(helpers) == len(mounts) and held
        result.consistency = Consistency.FROZEN if frozen else Consistency.SYNCED


def _flushed(path: Path, flush: Callable[[int], None]) -> bool:
    """Flushes a mount or a device; False if it could not be (gone meanwhile, or not ours to open)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        flush(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def thaw_recorded(record: Path) -> None:
    """Thaws what a run before this one left frozen; a mount that is not frozen, or gone, is left alone."""
    left = read_json(record)
    if left is None:
        return
    for mount in left["mounts"]:
        with contextlib.suppress(OSError):
            fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
            try:
                freeze.thaw(fd)
            finally:
                os.close(fd)
    remove_file(record)
