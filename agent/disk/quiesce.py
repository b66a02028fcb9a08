"""Brings what is mounted from a file or a block device to rest, for the moment of a clone.

What a loop device stands on, or an LV, lacks what its mount has not yet written. Each mount is frozen by a helper
process (`freeze.py`); where it cannot be frozen, it is synced; an attached device without a mount is flushed. What is
frozen is written down first, so that the agent can thaw it at its next start even if the helper was killed too. What a
block of this process holds at this moment is no such leftover: whoever thaws those leaves it alone.

Blocks may stand within one another, also in different threads: a mount that an outer block of this process holds
frozen is not frozen again, and the inner one asks that helper before it claims anything. So whoever wants several
volumes at one instant holds them all with `quiesced_together` and takes each one's snapshot within, as ever. One
deadline covers all of them. What is done within must not write to what is frozen: it would wait for that deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

from agent.disk import freeze, ioctl, loops
from agent.disk.durable import read_json, remove_file, write_json
from agent.stored import typed
from resilver.lineage import Consistency

FREEZE_MAX_S: Final = 10.0
_ANSWER_MAX_S: Final = 30.0
_ANSWER_BYTES_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class _Frozen:
    """What is written down of mounts that are frozen: how each is reached, and the number of its device."""

    mounts: tuple[str, ...]
    devices: tuple[str, ...] = ()


class _Helper:
    """One freeze helper, whose mount is frozen."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._asking = threading.Lock()

    @classmethod
    def start(cls, mount: Path, deadline_s: float) -> _Helper | None:
        """Freezes a mount; None if it cannot be frozen, or somebody else has done so."""
        command = [sys.executable, "-I", "-S", freeze.__file__, str(mount), str(deadline_s)]
        helper = cls(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
        if helper._answer() == b"frozen\n":
            return helper
        helper.thaw()
        return None

    def held(self) -> bool:
        """Whether the mount has been frozen from the start until now."""
        with self._asking:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(b"?")
            except (OSError, ValueError):  # it has ended, or been ended
                return False
            return self._answer() == b"held\n"

    def thaw(self) -> bool:
        """Ends the freeze; True if it had held until now. A helper that does not answer thaws whenever it can."""
        with self._asking:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            held = self._answer() == b"thawed\n"
            self._process.stdout.close()
            try:
                self._process.wait(_ANSWER_MAX_S)
            except subprocess.TimeoutExpired:
                return False
            return held

    def _answer(self) -> bytes:
        """The next line of the helper, empty at its end or if none comes in time."""
        assert self._process.stdout is not None
        line, until = b"", time.monotonic() + _ANSWER_MAX_S
        ready = select.poll()
        ready.register(self._process.stdout, select.POLLIN)
        while not line.endswith(b"\n") and len(line) < _ANSWER_BYTES_MAX:
            left_ms = int((until - time.monotonic()) * 1000)
            byte = self._process.stdout.read(1) if ready.poll(max(0, left_ms)) else b""
            if not byte:
                return b""
            line += byte
        return line


# The helpers of all blocks under way, by the mount's device; and by their records what they may freeze: how a mount is
# reached, and its device.
_helpers: Final[dict[str, _Helper]] = {}
_live: Final[dict[Path, frozenset[str]]] = {}
_lock: Final = threading.Lock()


class Quiesced:
    """What came of it, final once the block has ended. `held`: what could be frozen was so until then."""

    def __init__(self) -> None:
        self.consistency = Consistency.CRASH
        self.held = True


def quiesced(
    stat: os.stat_result, record: Path, *, others_write: bool, deadline_s: float = FREEZE_MAX_S, may_freeze: bool = True
) -> contextlib.AbstractContextManager[Quiesced]:
    """As `quiesced_together`, of one file or block device."""
    return quiesced_together((stat,), record, others_write=others_write, deadline_s=deadline_s, may_freeze=may_freeze)


@contextlib.contextmanager
def quiesced_together(
    stats: Sequence[os.stat_result],
    record: Path,
    *,
    others_write: bool,
    deadline_s: float = FREEZE_MAX_S,
    until: float | None = None,
    may_freeze: bool = True,
) -> Iterator[Quiesced]:
    """Brings the mounts upon files and block devices to rest around the block.

    `record` is where the frozen mounts are written down (one for each caller, on none of them; `thaw_recorded` at
    start). They thaw `deadline_s` after they were frozen at the latest, or at `until`, by the monotonic clock.
    `others_write`: somebody besides mounts and loop devices may write, so that the best that can be had is what a power
    cut would leave. FROZEN: each of them was, by its mounts, until the block had ended.
    """
    result = Quiesced()
    devices = [loops.devices_on(stat) for stat in stats]
    mounts = [_mounts_of(each) for each in devices]
    every = {mount.device: mount for each in mounts for mount in each}
    outer = _joined(every)
    own = {device: mount for device, mount in every.items() if device not in outer}
    started: dict[str, _Helper] = {}
    at_rest = held = True
    try:
        # Before the first is frozen: what freezing would write while its users wait.
        for mount in own.values():
            at_rest = _flushed(mount.reach, ioctl.syncfs) and at_rest
        if may_freeze and own:
            reaches = [str(mount.reach) for mount in own.values()]
            with _lock:
                _live[record.absolute()] = frozenset((*reaches, *own))
            write_json(record, {"mounts": reaches, "devices": list(own)})
            _freeze(own, time.monotonic() + deadline_s if until is None else until, started)
        for device in (device for each in devices for device in each):
            at_rest = _flushed(device.path, os.fsync) and at_rest
        yield result
    finally:
        for helper in outer.values():
            held = helper.held() and held
        held = result.held = _thaw(started) and held
        if may_freeze and own:
            try:
                remove_file(record)
            finally:
                with _lock:
                    _live.pop(record.absolute(), None)
    if all(devices) and at_rest and not others_write:
        frozen = held and all(mounts) and len(outer) + len(started) == len(every)
        result.consistency = Consistency.FROZEN if frozen else Consistency.SYNCED


def _mounts_of(devices: list[loops.Device]) -> list[loops.Mount]:
    return [mount for device in devices if not device.read_only for mount in loops.mounts_of(device)]


def _joined(mounts: dict[str, loops.Mount]) -> dict[str, _Helper]:
    """The helpers of outer blocks that hold some of these mounts at this moment."""
    with _lock:
        found = {device: _helpers[device] for device in mounts if device in _helpers}
    return {device: helper for device, helper in found.items() if helper.held()}


def _freeze(mounts: dict[str, loops.Mount], until: float, started: dict[str, _Helper]) -> None:
    """Freezes as many as can be; all of them thaw by one deadline."""
    for device, mount in mounts.items():
        helper = _Helper.start(mount.reach, max(0.0, until - time.monotonic()))
        if helper is not None:
            started[device] = helper
            with _lock:
                _helpers[device] = helper


def _thaw(started: dict[str, _Helper]) -> bool:
    """Thaws; True if all of them had held until now."""
    held = True
    with _lock:
        for device in started:
            _helpers.pop(device, None)
    for helper in started.values():
        held = helper.thaw() and held
    return held


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
    """Thaws what a run before this one left frozen; a mount that is not frozen, or gone, is left alone.

    So is a record of a block that is under way, and a mount that such a block holds.
    """
    if _is_live(record):
        return
    left = read_json(record)
    if left is None:
        return
    frozen = typed(record, left, _Frozen)
    for mount, device in zip_longest(frozen.mounts, frozen.devices, fillvalue=""):
        with _lock:
            held = any(mount in those or device in those for those in _live.values())
        if not held:
            _thaw_left(Path(mount), device)
    remove_file(record)


def _thaw_left(mount: Path, device: str) -> None:
    """By its path, or by any other mount of that device: one of another namespace was reached by a process of it, which
    may have ended while others go on.
    """
    others = (other.reach for other in loops.all_mounts() if other.device == device) if device else ()
    for path in (mount, *others):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            number = os.fstat(fd).st_dev
            # Of Btrfs the number is another one on each subvolume.
            if device in {"", f"{os.major(number)}:{os.minor(number)}"} or device.startswith("0:"):
                freeze.thaw(fd)
                return
        except OSError:  # it is not frozen, or not this one
            continue
        finally:
            os.close(fd)


def _is_live(record: Path) -> bool:
    with _lock:
        return record.absolute() in _live
