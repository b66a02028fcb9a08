"""The coordinator's metrics. Those of the cluster are read off the engine when asked for, on the leader only.

The metrics port is served by a thread of its own; the engine belongs to the event loop, so it is read there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import REGISTRY, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from coordinator.core.cluster import ReplicaState, VolumeState, VolumeView
from coordinator.core.engine import Engine
from coordinator.core.status import problems_of_volume, status_of, volume_state
from coordinator.front import Front
from resilver.errors import ResilverError
from resilver.volume import LiveState, ResyncState

Metric = GaugeMetricFamily | InfoMetricFamily
READ_MAX_S: Final = 5.0
_REASON: Final = re.compile(r"[A-Z_]+")


def register(front: Front) -> None:
    """Adds this coordinator's figures to what its metrics port serves."""
    REGISTRY.register(ClusterCollector(front, asyncio.get_running_loop()))


class ClusterCollector(Collector):
    """Volumes, replicas, nodes and resyncs, as the present engine sees them."""

    def __init__(self, front: Front, loop: asyncio.AbstractEventLoop) -> None:
        self._front = front
        self._loop = loop

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry would otherwise collect, on the loop's own thread, to find the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The figures of one moment; none if the event loop does not answer in time."""

        async def read() -> list[Metric]:
            return list(self._read())

        return iter(asyncio.run_coroutine_threadsafe(read(), self._loop).result(READ_MAX_S))

    def _read(self) -> Iterator[Metric]:
        try:
            engine = self._front.engine()
        except ResilverError:
            yield GaugeMetricFamily("resilver_coordinator_is_leader", "1 on the leader.", value=0)
            return
        yield GaugeMetricFamily("resilver_coordinator_is_leader", "1 on the leader.", value=1)
        yield GaugeMetricFamily("resilver_coordinator_term", "The present term.", value=engine.identity.term)
        yield from _nodes(engine)
        views = [engine.view(name) for name in engine.volume_names()]
        yield from _volumes(views, self._front.now_ms())
        yield from _replicas(engine, views, self._front.now_ms())
        resyncs = GaugeMetricFamily("resilver_resyncs", "Resyncs that are kept, by where they stand.", labels=["state"])
        for state in ResyncState:
            count = sum(one.state is state for one in engine.resyncs().values())
            resyncs.add_metric([state.name], count)
        yield resyncs


def _nodes(engine: Engine) -> Iterator[Metric]:
    up = GaugeMetricFamily("resilver_node_up", "1 while a node is connected.", labels=["node"])
    heard = GaugeMetricFamily("resilver_node_last_report_timestamp_seconds", "Unix time.", labels=["node"])
    for node in engine.nodes().values():
        up.add_metric([node.name], float(node.reachable))
        heard.add_metric([node.name], node.last_heard_ms / 1000)
    yield from (up, heard)


def _volumes(views: list[VolumeView], now_ms: int) -> Iterator[Metric]:
    blocked = GaugeMetricFamily("resilver_volume_blocked", "1 for each reason.", labels=["volume", "reason"])
    epoch = GaugeMetricFamily("resilver_volume_epoch", "The present epoch.", labels=["volume"])
    newest = GaugeMetricFamily(
        "resilver_volume_newest_cp_timestamp_seconds", "When the newest known CP was taken.", labels=["volume"]
    )
    primary = GaugeMetricFamily("resilver_volume_primary_info", "1 for the primary.", labels=["volume", "node"])
    for view in views:
        epoch.add_metric([view.name], view.record.epoch)
        if view.entry is not None:
            newest.add_metric([view.name], view.entry.newest_cp_time_ms / 1000)
            primary.add_metric([view.name, view.record.primary], 1)
        if volume_state(view) is VolumeState.BLOCKED:
            for problem in problems_of_volume(view, now_ms):
                if _REASON.fullmatch(problem[0]):
                    blocked.add_metric([view.name, problem[0]], 1)
    yield from (blocked, epoch, newest, primary)


def _replicas(engine: Engine, views: list[VolumeView], now_ms: int) -> Iterator[Metric]:
    labels = ["volume", "node"]
    states = GaugeMetricFamily("resilver_replica_state", "1 for the present state.", labels=[*labels, "state"])
    behind = GaugeMetricFamily("resilver_replica_behind_cps", "CPs of the primary that it lacks.", labels=labels)
    seconds = GaugeMetricFamily("resilver_replica_behind_seconds", "Since the first CP that it lacks.", labels=labels)
    lacking = GaugeMetricFamily("resilver_replica_out_of_sync_bytes", "What a delta would copy.", labels=labels)
    common = GaugeMetricFamily("resilver_replica_common_snapshot", "1 if a delta is possible.", labels=labels)
    when = GaugeMetricFamily("resilver_replica_common_snapshot_timestamp_seconds", "Unix time.", labels=labels)
    modified = GaugeMetricFamily("resilver_replica_live_modified", "1 if the live copy differs.", labels=labels)
    in_use = GaugeMetricFamily("resilver_replica_in_use", "1 if something has the live copy open.", labels=labels)
    for view in views:
        tip = view.primary.lineage.tip_id if view.primary is not None else ""
        for node, replica in view.replicas.items():
            status, key = status_of(view, node), [view.name, node]
            for state in ReplicaState:
                states.add_metric([*key, state.value], float(status.state is state))
            if status.behind_cps is not None:
                behind.add_metric(key, status.behind_cps)
                seconds.add_metric(key, _behind_seconds(view, node, now_ms))
            if status.common is not None:
                size = engine.size(view.name, status.common.id, tip)
                when.add_metric(key, status.common.create_time_ms / 1000)
                if size is not None and size.bytes is not None:
                    lacking.add_metric(key, size.bytes)
            common.add_metric(key, float(status.common is not None))
            if replica.report is not None:
                modified.add_metric(key, float(replica.report.live.state is LiveState.MODIFIED))
                in_use.add_metric(key, float(bool(replica.report.live.in_use)))
    yield from (states, behind, seconds, lacking, common, when, modified, in_use)


def _behind_seconds(view: VolumeView, node: str, now_ms: int) -> float:
    fork = status_of(view, node).fork
    if view.primary is None or node == view.record.primary:
        return 0.0
    missed = view.primary.lineage.after(fork.id if fork is not None else "")
    return max(0.0, (now_ms - missed[-1].create_time_ms) / 1000) if missed else 0.0
