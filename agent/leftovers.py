"""What orders have left held: every `after` that has not succeeded is run until it has, and what is frozen is thawed.

* Each record in state_dir is an order whose `after`s are still due. Those of a volume run when it is recovered, and
  before its next CP (`recover`). Those that fail then are run again by the agent itself, each time after twice as long
  a pause, and so are at once those that no volume of the configuration has.
* A record goes once all of its `after`s have succeeded. Until then each of its volumes has one problem that says why;
  it is told when it comes and when it goes, not with every try.
* A record that cannot be read concerns nobody else's. What it was for is not known, so all volumes with hooks tell of
  it. It keeps no CP from being taken, because each one's own `before` brings its volume to rest: unless the process
  that has its hooks still runs, which would let go what that order holds.
* A record that is locked, or of an order under way here, is somebody else's to end. And none is ended while an order
  holds one of its volumes: its `after` would let go what that one's `before` holds (`holding`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from agent.disk import quiesce
from agent.disk.durable import Json, disk_errors, read_json
from agent.examiner import Problems
from agent.hooks import HookWatch, program_fault, under_way
from agent.stored import typed
from agent.worker import Worker
from resilver.errors import Refused, ResilverError, Unavailable

LOOK_S: Final = 1.0
ENDING_MAX_S: Final = 120.0
PAUSE_MIN_S: Final = 1.0
PAUSE_MAX_S: Final = 60.0

_log = structlog.get_logger(__name__)
_thawing: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What of a hook is looked at before a record is acted on."""

    volume: str
    after: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Record:
    hooks: tuple[_Recorded, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """A record of an order that has ended: of which volumes, or why that cannot be read."""

    path: Path
    volumes: tuple[str, ...] = ()
    damage: str = ""


class _Turns:
    """Which volumes orders hold, and which records' `after`s run: never both of one volume."""

    def __init__(self) -> None:
        self._news: Final = threading.Condition()
        self._held: Final[Counter[str]] = Counter()
        self._ending: Final[Counter[str]] = Counter()

    @contextlib.contextmanager
    def holding(self, volumes: Collection[str]) -> Iterator[None]:
        with self._news:
            if not self._news.wait_for(lambda: not any(self._ending[volume] for volume in volumes), ENDING_MAX_S):
                said = "no consistency point was taken: the hooks of an earlier order are still being ended"
                raise Refused("HOOK_FAILED", said)
            self._held.update(volumes)
        try:
            yield
        finally:
            with self._news:
                self._held.subtract(volumes)

    @contextlib.contextmanager
    def ending(self, volumes: Collection[str], mine: Collection[str]) -> Iterator[bool]:
        """Whether it is the record's turn; the order that asks holds `mine`."""
        with self._news:
            free = not any(self._ending[each] or self._held[each] > (each in mine) for each in volumes)
            if free:
                self._ending.update(volumes)
        try:
            yield free
        finally:
            if free:
                with self._news:
                    self._ending.subtract(volumes)
                    self._news.notify_all()


_turns: Final = _Turns()
holding: Final = _turns.holding
"""Around an order with hooks, from before its `recover` until its own `after`s have ended."""


def recover(directory: Path, volume: str, *, held: Collection[str] = ()) -> dict[str, str]:
    """Thaws what an order left frozen, and runs each `after` of the orders that concern the volume and did not end.

    Other orders may be under way meanwhile: what they hold is theirs. `held`: what the order holds that asks for it.

    Answers those that failed, by volume. HOOK_FAILED while a process of an earlier agent runs hooks that might let go
    what the order is going to hold.
    """
    failed: dict[str, str] = {}
    _thaw(directory)
    for path in sorted(directory.glob("*.json")):
        if under_way(path):
            continue
        left = _look(path)
        if left is None or not (left.damage or volume in left.volumes):
            continue
        if not left.damage:
            _log.warning("hooks that were not ended are ended now", volume=volume, record=str(path))
            found = end(left, held)
            if found is not None:
                failed |= found
                continue
        else:
            _log.error("a record of hooks cannot be read", path=str(path), why=left.damage)
        if held and not _is_free(path):
            why = left.damage or f"{path} is theirs"
            said = f"no consistency point was taken: hooks of an earlier order are still being run, and {why}"
            raise Refused("HOOK_FAILED", said, volume=volume)
    return failed


def end(left: Left, held: Collection[str] = ()) -> dict[str, str] | None:
    """Runs each `after` of a record; waits for another process that is at it. Why those failed that did, by volume;
    None if others hold one of its volumes, or are at it.
    """
    with _turns.ending(left.volumes, held) as free:
        if not free:
            return None
        read = _read(left.path)
        if read is None:
            return {}
        spec, hooks = read
        # Since it was written the programs may have changed.
        faults = {hook.volume: program_fault(hook.after) for hook in hooks if hook.after}
        if found := {volume: fault for volume, fault in faults.items() if fault}:
            return found
        return HookWatch.recover({**spec, "record": str(left.path)}).end()


def look(directory: Path) -> list[Left]:
    """The records that nobody is at. What is frozen, and no order's under way, is thawed."""
    damaged = _thaw(directory)
    paths = [path for path in sorted(directory.glob("*.json")) if not under_way(path)]
    return [*damaged, *filter(None, (_look(path, only_free=True) for path in paths))]


def _look(path: Path, *, only_free: bool = False) -> Left | None:
    """None if there is none any more; `only_free`: or a process runs its hooks."""
    try:
        if only_free and not _is_free(path):
            return None
        read = _read(path)
    except ResilverError as error:
        return Left(path, damage=error.message)
    return None if read is None else Left(path, tuple(hook.volume for hook in read[1]))


def _read(path: Path) -> tuple[Json, tuple[_Recorded, ...]] | None:
    spec = read_json(path)
    return None if spec is None else (spec, typed(path, spec, _Record).hooks)


def _thaw(directory: Path) -> list[Left]:
    """Those whose records cannot be read."""
    damaged = []
    with _thawing:
        for path in sorted(directory.glob("*.frozen")):
            try:
                quiesce.thaw_recorded(path)
            except ResilverError as error:
                damaged.append(Left(path, damage=error.message))
    return damaged


def _is_free(path: Path) -> bool:
    """Whether no process runs its hooks."""
    with disk_errors(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link: none of ours
                return True
            raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


class Concerned(Protocol):
    """A replica, as far as it is told of hooks; on its worker."""

    @property
    def worker(self) -> Worker: ...

    def hooks_told(self, after: str | None, unread: Problems = None, *, again: bool = False) -> None:
        """See `Examiner.hooks_told`."""


@dataclass(slots=True)
class _Due:
    at: float
    pause_s: float
    worker: Worker
    running: asyncio.Task[None] | None = None


class Leftovers:
    """Ends what is left, for as long as the agent runs. Belongs to the event loop."""

    def __init__(self, directory: Path, replicas: Mapping[str, Concerned]) -> None:
        self._directory: Final = directory
        self._replicas: Final = replicas
        self._worker: Final = Worker("hooks")
        self._due: Final[dict[Path, _Due]] = {}
        self._damage: tuple[str, ...] = ()
        self._news: Final[dict[tuple[str, str], dict[str, Any]]] = {}
        self._telling: Final[dict[str, Future[None]]] = {}

    async def run(self) -> None:
        """Never returns."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    found = await self._worker.run(partial(look, self._directory))
                except (ResilverError, OSError) as error:
                    _log.error("what hooks have left cannot be looked at", why=str(error))
                else:
                    self._damaged(tuple(left.damage for left in found if left.damage))
                    self._begin(group, {left.path: left for left in found if not left.damage})
                self._tell()
                await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        """Nothing is waited for: what is being ended is ended by a process of its own."""
        self._worker.close()
        for due in self._due.values():
            due.worker.close()

    def _begin(self, group: asyncio.TaskGroup, found: Mapping[Path, Left]) -> None:
        now = time.monotonic()
        for path, due in list(self._due.items()):
            if due.running is None and path not in found:
                due.worker.close()
                del self._due[path]
        for path, left in found.items():
            if path not in self._due:
                # Those of a volume are its own to end first, when it is recovered; the others are nobody's.
                owned = any(volume in self._replicas for volume in left.volumes)
                pause_s = PAUSE_MIN_S if owned else 0.0
                self._due[path] = _Due(now + pause_s, PAUSE_MIN_S, Worker(f"hooks of {path.name}"))
            due = self._due[path]
            if due.running is None and now >= due.at:
                due.running = group.create_task(self._end(left, due))

    async def _end(self, left: Left, due: _Due) -> None:
        try:
            failed = await due.worker.run(partial(end, left))
            if failed is None:  # with the next look
                due.running = None
                return
        except (ResilverError, OSError) as error:
            failed = {"": str(error)}
        except Exception as error:  # noqa: BLE001 - one record's trouble would end the task of all
            _log.exception("what hooks have left was not ended", record=str(left.path))
            failed = {"": f"unforeseen: {type(error).__name__}"}
        for volume in left.volumes:
            why = failed.get(volume, failed.get("", ""))
            if volume in self._replicas:
                self._news[volume, "after"] = {"after": why, "again": True}
            elif why:
                _log.error("an `after` of a volume that is not configured failed", volume=volume, why=why)
        self._tell()
        due.running, due.at = None, time.monotonic() + due.pause_s
        due.pause_s = min(2 * due.pause_s, PAUSE_MAX_S)

    def _damaged(self, damage: tuple[str, ...]) -> None:
        if damage == self._damage:
            return
        self._damage = damage
        for why in damage:
            _log.error("a record of hooks cannot be read", why=why)
        for volume in self._replicas:
            self._news[volume, "unread"] = {"after": None, "unread": damage}

    def _tell(self) -> None:
        """Tells the replicas, on their own threads. One whose disk hangs is told the last news once it does not."""
        for (volume, what), news in list(self._news.items()):
            telling = self._telling.get(volume)
            if telling is not None and not telling.done():
                continue
            replica = self._replicas[volume]
            with contextlib.suppress(Unavailable):
                self._telling[volume] = replica.worker.submit(partial(replica.hooks_told, **news))
                del self._news[volume, what]
