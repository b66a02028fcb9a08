"""Volumes as they were last shown: what has not changed since is not worked out again.

The rules:

* A volume is shown from its view, and the engine gives the same view for as long as nothing of it has changed.
* What goes on by itself is set each time: when a replica was last heard of, and for how long it has been behind. What
  stands in sentences is an age in words, so the message lasts until the first of those words would be another.
* What is answered here is to be copied into an answer, and not to be changed.
* It is kept encoded as well: of a cluster of thousands of volumes, to copy the messages into an answer and to measure
  them cost more than all the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.core.cluster import VolumeView
from coordinator.core.status import status_of
from coordinator.core.words import age_holds_ms, rest_holds_ms
from coordinator.office import Engine
from coordinator.views import behind_since_ms, volume_to_proto
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2

KEPT_MAX: Final = 20_000
HOLDS_MAX_MS: Final = 24 * 3600 * 1000
NEVER_MS: Final = -1
"""No time at which anything was heard: the first look sets the stamp."""


@dataclass(slots=True)
class _Heard:
    """When a replica that is here was last heard of, where its message says so, and what that says now."""

    node: str
    report_time_ms: int
    stamp: Timestamp
    stamp_ms: int


@dataclass(slots=True)
class _Kept:
    """An answer of one volume, the fields in it that go on by themselves, and from when to when the rest is right."""

    view: VolumeView
    answer: api.ListVolumesResponse
    heard: list[_Heard]
    behind: list[tuple[int, Duration]]
    from_ms: int
    until_ms: int
    encoded: bytes = b""

    @property
    def message(self) -> volume_pb2.Volume:
        return self.answer.volumes[0]

    def go_on(self, engine: Engine, now_ms: int) -> None:
        """Sets what goes on by itself, and forgets the encoding if that has changed."""
        nodes = engine.nodes()
        for heard in self.heard:
            heard_ms = max(heard.report_time_ms, nodes[heard.node].last_heard_ms)
            if heard_ms != heard.stamp_ms:
                heard.stamp_ms = heard_ms
                heard.stamp.seconds = heard_ms // 1000
                heard.stamp.nanos = heard_ms % 1000 * 1_000_000
                self.encoded = b""
        for since_ms, duration in self.behind:
            behind_ms = max(now_ms - since_ms, 0)
            duration.seconds = behind_ms // 1000
            duration.nanos = behind_ms % 1000 * 1_000_000
            self.encoded = b""


class Shown:
    """Of one engine at a time: another reign's is another mind."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._kept: dict[str, _Kept] = {}

    def volume(self, engine: Engine, name: str, now_ms: int) -> volume_pb2.Volume:
        """The volume without lineages. Raises `NotFound("VOLUME_NOT_FOUND")`."""
        return self._shown(engine, name, now_ms).message

    def encoded(self, engine: Engine, name: str, now_ms: int) -> bytes:
        """The same as a `ListVolumesResponse` of this volume alone: put together, such bytes are one of all of them."""
        kept = self._shown(engine, name, now_ms)
        if not kept.encoded:
            kept.encoded = kept.answer.SerializeToString()
        return kept.encoded

    def _shown(self, engine: Engine, name: str, now_ms: int) -> _Kept:
        if self._engine is not engine or len(self._kept) >= KEPT_MAX:
            self._engine = engine
            self._kept.clear()
        view = engine.view(name)
        kept = self._kept.get(name)
        if kept is None or kept.view is not view or not kept.from_ms <= now_ms < kept.until_ms:
            kept = self._kept[name] = _keep(engine, view, now_ms)
        else:
            kept.go_on(engine, now_ms)
        return kept


def _keep(engine: Engine, view: VolumeView, now_ms: int) -> _Kept:
    answer = api.ListVolumesResponse(volumes=[volume_to_proto(engine, view, now_ms, full=False)])
    kept = _Kept(view, answer, [], [], now_ms, now_ms + HOLDS_MAX_MS)
    holds = [HOLDS_MAX_MS]
    for shown in kept.message.replicas:
        replica = view.replica(shown.node)
        since_ms = behind_since_ms(view, shown.node, status_of(view, shown.node))
        if since_ms is not None:
            kept.behind.append((since_ms, shown.behind_duration))
            holds.append(age_holds_ms(now_ms - since_ms))
        if not replica.fresh:
            holds.append(age_holds_ms(now_ms - replica.report_time_ms))
        elif shown.HasField("report_time"):
            kept.heard.append(_Heard(shown.node, replica.report_time_ms, shown.report_time, NEVER_MS))
    pause = view.entry.pause if view.entry is not None else None
    if pause is not None and pause.until_ms is not None:
        holds.append(rest_holds_ms(pause.until_ms - now_ms))
    kept.until_ms = now_ms + min(holds)
    return kept
