"""Resyncs that were blocked because their target was in use: they go on, with the same stage, once it no longer is."""

from __future__ import annotations

from itertools import takewhile
from typing import Final

from coordinator.core.cluster import Resync
from coordinator.core.context import Context
from coordinator.core.resyncs import begin
from coordinator.core.tasks import Flow, Wait
from resilver.volume import ResyncState

STAGE_LIFE_MS: Final = 24 * 3600 * 1000
RETRIES_MAX: Final = 20
RETRY_PAUSE_MS: Final = 10_000
RETRY_PAUSE_MAX_MS: Final = 600_000


def retry_blocked(context: Context, volume: str, node: str) -> None:
    """At once, and if it is blocked again after pauses that grow, and not for ever."""
    heard, entry = context.heard.get(volume, {}).get(node), context.entries.get(volume)
    if entry is None or heard is None or heard.report.live.in_use is not False or not context.current(node, heard):
        return
    blocked = _blocked_in_a_row(context, volume, node)
    if not 0 < len(blocked) <= RETRIES_MAX or context.active_resync(volume, node) is not None:
        return
    last = blocked[0]
    waits = entry.pause is None and last.epoch == entry.record.epoch and not entry.opening
    if not waits or context.now_ms - last.end_time_ms >= STAGE_LIFE_MS:
        return
    pause_ms = min(RETRY_PAUSE_MS << len(blocked) - 2, RETRY_PAUSE_MAX_MS) if len(blocked) > 1 else 0
    if context.now_ms >= last.end_time_ms + pause_ms:
        begin(context, volume, last.plan, last.principal)
    elif (volume, node) not in context.retrying:
        context.retrying.add((volume, node))
        context.tasks.spawn(_retry_later(context, volume, node, last.end_time_ms + pause_ms))


def _retry_later(context: Context, volume: str, node: str, time_ms: int) -> Flow[None]:
    yield Wait(frozenset({f"retry:{volume}"}), lambda: False, time_ms)
    context.retrying.discard((volume, node))
    retry_blocked(context, volume, node)


def _blocked_in_a_row(context: Context, volume: str, node: str) -> list[Resync]:
    """The replica's last resyncs, newest first, as far as they had one goal and ended because it was in use."""
    ours = sorted(
        (one for one in context.resyncs.of(volume) if one.node == node),
        key=lambda one: (one.end_time_ms, one.create_time_ms),
        reverse=True,
    )

    def in_use(one: Resync) -> bool:
        said = one.refusal.reasons[:1] if one.refusal is not None else ()
        return one.state is ResyncState.BLOCKED and said == ("IN_USE",) and one.plan.target == ours[0].plan.target

    return list(takewhile(in_use, ours))
