"""The caps of this node: those of its file, and over them what an operator has ordered for a while.

* An order is in state_dir before it holds, so that it outlives a restart of the agent and any coordinator; it ends by
  itself, and the file's value counts again. In state_dir and not in the store, because it is about this machine, and
  has to hold with no coordinator in reach.
* Its end runs on the clock that does not jump; across a restart wall time has to do.
* What cannot be read is no order: caps are a courtesy, and no reason for an agent not to start.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from agent.disk.durable import read_json, write_json
from agent.stored import typed
from agent.stream.throttle import Throttle
from resilver.errors import ResilverError
from resilver.limits import LIMIT_SECONDS_MAX, Cap, NodeLimits, rate_fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.disk.durable import Json
    from resilver.config import Limits
    from resilver.limits import LimitChange

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Ordered:
    """`ends_at` is in seconds of the clock that does not jump, `until_ms` what that was in wall time at first."""

    bytes_s: int
    ends_at: float
    until_ms: int


@dataclass(frozen=True, slots=True)
class _Saved:
    """As `_Ordered`, in wall time."""

    bytes_s: int
    ends_at: float


class Caps:
    """Both directions, for several threads. `order` blocks on the disk; nothing else does."""

    def __init__(
        self,
        path: Path,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.receive: Final = Throttle()
        self.send: Final = Throttle()
        self._path: Final = path
        self._clock: Final = clock
        self._wall: Final = wall
        self._ordering: Final = threading.Lock()
        self._mutex: Final = threading.Lock()
        self._limits = limits
        self._ordered: dict[str, _Ordered] = {}
        self._load()
        self._apply()

    def take_on(self, limits: Limits) -> None:
        """What the file says now; an order goes before it until it ends."""
        with self._mutex:
            self._limits = limits
            self._apply()

    def order(self, change: LimitChange) -> NodeLimits:
        """Takes on what an operator wants, on the disk when this returns; what holds then."""
        with self._ordering:
            ordered = {} if change.clear else dict(self._ordered)
            ends_at = self._clock() + change.duration_s
            until_ms = round((self._wall() + change.duration_s) * 1000)
            for side, bytes_s in (("receive", change.receive_bytes_s), ("send", change.send_bytes_s)):
                if bytes_s is not None:
                    ordered[side] = _Ordered(bytes_s, ends_at, until_ms)
            self._save(ordered)
            with self._mutex:
                self._ordered = ordered
                self._apply()
                return self._now()

    def now(self) -> NodeLimits:
        """What holds; an order whose time has come is over with this."""
        with self._mutex:
            return self._now()

    def _now(self) -> NodeLimits:
        now = self._clock()
        left = {side: one for side, one in self._ordered.items() if one.ends_at > now}
        if left != self._ordered:
            _log.info("limit ended", sides=sorted(self._ordered.keys() - left.keys()))
            self._ordered = left  # the file on the disk says when it ended: nothing is to be written for it
            self._apply()
        return NodeLimits(
            self._cap("receive", self.receive),
            self._cap("send", self.send),
            self._limits.receive_max_count,
            self._limits.send_max_count,
        )

    def _cap(self, side: str, throttle: Throttle) -> Cap:
        ordered = self._ordered.get(side)
        return Cap(throttle.bytes_s, 0 if ordered is None else ordered.until_ms)

    def _apply(self) -> None:
        stated = {"receive": self._limits.receive_max_bytes_s, "send": self._limits.send_max_bytes_s}
        for side, throttle in (("receive", self.receive), ("send", self.send)):
            ordered = self._ordered.get(side)
            throttle.set(stated[side] if ordered is None else ordered.bytes_s)

    def _save(self, ordered: dict[str, _Ordered]) -> None:
        now, wall = self._clock(), self._wall()
        value: Json = {
            side: {"bytes_s": one.bytes_s, "ends_at": wall + one.ends_at - now} for side, one in ordered.items()
        }
        write_json(self._path, value)

    def _load(self) -> None:
        now, wall = self._clock(), self._wall()
        try:
            value = read_json(self._path) or {}
            for side in ("receive", "send"):
                if side not in value:
                    continue
                saved = typed(self._path, value[side], _Saved)
                bytes_s, left_s = saved.bytes_s, saved.ends_at - wall
                if left_s > 0 and not rate_fault(bytes_s):
                    left_s = min(left_s, LIMIT_SECONDS_MAX)
                    self._ordered[side] = _Ordered(bytes_s, now + left_s, round((wall + left_s) * 1000))
        except ResilverError as error:
            _log.warning("limits not read", path=str(self._path), why=str(error))
