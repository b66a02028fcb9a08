"""What a node allows mirroring to take: caps from its file and from an operator, and how many resyncs at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agent.disk.ioprio import io_class
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.agent.stream.support import Proxy
from tests.cluster import Cluster, cluster, free_port, wait_for
from tests.loopfs import needs_root

pytestmark = [needs_root, pytest.mark.timeout(300)]

SIZE_BYTES = 24 * MIB
CAP_BYTES_S = 8_000_000
WINDOW_S = 2.5
SMALL = {"w1": 0, "w2": 5, "w3": 1, "w4": 5}
"""Volumes beside the large one, with the priorities that they get by a reload."""


def _seconds(time_text: str) -> float:
    return datetime.fromisoformat(time_text).timestamp()


@dataclass
class Wire:
    """What passed between source and target, and when."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def passed(self, data: bytearray, _passed: int) -> None:
        self.samples.append((time.monotonic(), len(data)))

    def most_in(self, window_s: float) -> int:
        """The most bytes in any stretch of that length."""
        most = within = first = 0
        for when, count in self.samples:
            within += count
            while self.samples[first][0] <= when - window_s:
                within -= self.samples[first][1]
                first += 1
            most = max(most, within)
        return most


@dataclass
class Scene:
    made: Cluster
    wire: Wire
    config: Path

    def limits(self) -> dict[str, Any]:
        """What holds on b, once it has said so."""
        found: dict[str, Any] = wait_for(lambda: self.made.node("b").get("limits"), "b says what holds")
        return found

    def resync(self) -> str:
        (resync,) = self.made.ask("StartResync", api.StartResyncRequest(volumes=["vm1"])).resyncs
        return str(resync.id)

    def run(self, resync_id: str) -> dict[str, Any]:
        return next((run for run in self.made.resyncs("vm1") if run["id"] == resync_id), {})

    def done(self, resync_id: str) -> None:
        run = wait_for(lambda: (found := self.run(resync_id)).get("end_time") and found, f"{resync_id} ends")
        assert run["state"] == "SUCCEEDED", run
        assert identical(self.made.image("a", "vm1"), self.made.image("b", "vm1"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Scene]:
    with cluster(tmp_path_factory.mktemp("manners"), "sqlite") as made:
        made.start_coordinator()
        made.ports["a-stream"] = free_port()
        wire = Wire()
        with Proxy(made.ports["a-stream"], wire.passed) as proxy:
            images.make(disk / "a" / "vm1.img", SIZE_BYTES, SIZE_BYTES, seed=1)
            for name in SMALL:
                images.make(disk / "a" / f"{name}.img", MIB, MIB, seed=3)
            (disk / "b").mkdir()
            for node, extra in (
                ("a", f'stream_advertise = "127.0.0.1:{proxy.port}"'),
                ("b", f"[limits]\nreceive_max_bytes_s = {CAP_BYTES_S}"),
            ):
                made.start_agent(node, {name: disk / node / f"{name}.img" for name in ("vm1", *SMALL)}, extra)
            for name in ("vm1", *SMALL):
                made.wait_reachable(name, "a", "b")
            yield Scene(made, wire, made.directory / "b.toml")


def test_a_cap_of_the_file_holds_over_any_stretch(scene: Scene) -> None:
    assert scene.limits()["receive"] == {"bytes_per_second": CAP_BYTES_S, "until_time": None}
    resync_id = scene.resync()
    scene.done(resync_id)
    samples = scene.wire.samples
    assert sum(count for _, count in samples) >= SIZE_BYTES
    assert samples[-1][0] - samples[0][0] > WINDOW_S
    assert scene.wire.most_in(WINDOW_S) <= 1.1 * CAP_BYTES_S * WINDOW_S


def test_an_operators_limit_outlives_a_restart_and_ends_by_itself(scene: Scene) -> None:
    made = scene.made
    shown = made.ok("limit", "b", "--in", "1MB", "--out", "0", "--for", "1h")["node"]["limits"]
    assert shown["receive"]["bytes_per_second"] == 1_000_000
    assert shown["send"]["bytes_per_second"] == 0
    assert shown["receive"]["until_time"]
    assert made.ok("limit", "b")["node"]["limits"] == shown
    # A transfer begins under it, and goes on when the cap is another one.
    images.make(made.image("a", "vm1"), SIZE_BYTES, SIZE_BYTES, seed=2)
    resync_id = scene.resync()
    wait_for(lambda: (scene.run(resync_id).get("done_bytes") or 0) >= MIB, "it has begun")
    made.processes["b"].kill()
    made.wait_away("vm1", "b")
    made.restart("b")
    made.wait_reachable("vm1", "b")
    assert scene.limits()["receive"]["bytes_per_second"] == 1_000_000
    until, before = (_seconds(one["receive"]["until_time"]) for one in (scene.limits(), shown))
    assert abs(until - before) < 1
    assert not scene.run(resync_id)["end_time"]
    change = pb.NodeLimitChange(receive_bytes_per_second=0)
    change.limit_duration.FromSeconds(2)
    answer = made.ask("UpdateNode", api.UpdateNodeRequest(node="b", limits=change))
    assert answer.node.limits.receive.bytes_per_second == 0
    scene.done(resync_id)
    wait_for(lambda: scene.limits()["receive"]["bytes_per_second"] == CAP_BYTES_S, "the file counts again")
    assert scene.limits()["receive"]["until_time"] is None
    assert "limit ended" in made.log("b")
    told = [event.message for event in made.ask("ListEvents", api.ListEventsRequest(node="b")).events]
    assert "b: receive 1 MB/s, send without a cap, for 1h" in told
    assert made.ok("limit", "b", "--clear")["node"]["limits"]["send"]["until_time"] is None


def test_a_wrong_limit_is_told_and_changes_nothing(scene: Scene) -> None:
    before = scene.limits()
    for words, said in (
        (("limit", "b", "--in", "fast"), "is no rate; write it like 50MB"),
        (("limit", "b", "--in", "1kB"), "should be 0 (no cap), or at least 65536 bytes a second"),
        (("limit", "b", "--for", "2h"), "--for goes with --in or --out"),
        (("limit", "nobody", "--in", "1MB"), "no node is named 'nobody'"),
    ):
        ran = scene.made.cli(*words)
        assert (ran.code, said in ran.err) == (2, True), ran.err
    assert scene.limits() == before


def idle_threads(pid: int) -> int:
    found = 0
    for each in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found += io_class(int(each.name)) == 3
    return found


def test_a_reload_and_places_that_are_scarce(scene: Scene) -> None:
    """One at a time on b, by priority, and at the I/O priority of its file."""
    made = scene.made
    text = scene.config.read_text()
    text = text.replace("[limits]", '[limits]\nio_priority = "idle"\nreceive_max_count = 1\nsend_max_count = 9')
    for name, priority in SMALL.items():
        text = text.replace(f'name = "{name}"', f'name = "{name}"\nresync_priority = {priority}')
    scene.config.write_text(text)
    made.processes["b"].send(signal.SIGHUP)
    wait_for(lambda: scene.limits()["receive_max_count"] == 1, "the new bound is told")
    for name, priority in SMALL.items():
        said = partial(made.replicas, name)
        wait_for(lambda said=said, p=priority: said()["b"]["resync_priority"] == p, f"the priority of {name} is told")

    # One holds the only place, and is slow.
    change = pb.NodeLimitChange(receive_bytes_per_second=1_000_000)
    made.ask("UpdateNode", api.UpdateNodeRequest(node="b", limits=change))
    images.make(made.image("a", "vm1"), SIZE_BYTES, SIZE_BYTES, seed=4)
    resync_id = scene.resync()
    wait_for(lambda: (scene.run(resync_id).get("done_bytes") or 0) >= MIB, "it has begun")
    wait_for(lambda: idle_threads(made.processes["b"].pid) >= 2, "what receives and what writes is idle")
    assert not idle_threads(made.processes["a"].pid)
    queued = made.ask("StartResync", api.StartResyncRequest(volumes=list(SMALL))).resyncs
    ids = {one.id: one.volume for one in queued}
    assert len(ids) == len(SMALL)

    def small() -> list[dict[str, Any]]:
        return [run for name in SMALL for run in made.resyncs(name) if run["id"] in ids]

    assert {run["state"] for run in small()} == {"QUEUED"}
    assert {run["volume"]: run["priority"] for run in small()} == SMALL
    made.ask("UpdateNode", api.UpdateNodeRequest(node="b", limits=pb.NodeLimitChange(clear=True)))
    scene.done(resync_id)
    wait_for(lambda: all(run["state"] == "SUCCEEDED" for run in small()), "all are done")
    runs = sorted([*small(), scene.run(resync_id)], key=lambda run: str(run["start_time"]))
    assert runs[0]["volume"] == "vm1"
    assert [run["priority"] for run in runs[1:]] == [5, 5, 1, 0]
    for before, after in pairwise(runs):
        assert _seconds(before["end_time"]) <= _seconds(after["start_time"])
