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
    """`ends_at` is in seconds of the clock that does not jump."""

    bytes_s: int
    ends_at: float


class Caps:
    """Both directions. Methods may block on the disk, and may be called from several threads."""

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
        with self._mutex:
            ordered = {} if change.clear else dict(self._ordered)
            ends_at = self._clock() + change.duration_s
            for side, bytes_s in (("receive", change.receive_bytes_s), ("send", change.send_bytes_s)):
                if bytes_s is not None:
                    ordered[side] = _Ordered(bytes_s, ends_at)
            self._save(ordered)
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
            self._cap("receive", self.receive, now),
            self._cap("send", self.send, now),
            self._limits.receive_max_count,
            self._limits.send_max_count,
        )

    def _cap(self, side: str, throttle: Throttle, now: float) -> Cap:
        ordered = self._ordered.get(side)
        until = 0 if ordered is None else round((self._wall() + ordered.ends_at - now) * 1000)
        return Cap(throttle.bytes_s, until)

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
        self._ordered = ordered

    def _load(self) -> None:
        now, wall = self._clock(), self._wall()
        try:
            value = read_json(self._path) or {}
            for side in ("receive", "send"):
                if side not in value:
                    continue
                bytes_s, left_s = int(value[side]["bytes_s"]), float(value[side]["ends_at"]) - wall
                if left_s > 0 and not rate_fault(bytes_s):
                    self._ordered[side] = _Ordered(bytes_s, now + min(left_s, LIMIT_SECONDS_MAX))
        except (ResilverError, ValueError, TypeError, KeyError) as error:
            _log.warning("limits not read", path=str(self._path), why=str(error))
