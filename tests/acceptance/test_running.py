"""What an operator watches and does while a cluster runs: logs, metrics, and a stop in the middle of a transfer."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from resilver.v1 import coordinator_pb2 as api
from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.agent.relay import Relay
from tests.cluster import Cluster, cluster, free_port, wait_for
from tests.loopfs import needs_root

pytestmark = [needs_root, pytest.mark.timeout(300)]

SIZE_BYTES = 32 * MIB
HOLD_AFTER_BYTES = 12 * MIB
STOP_MAX_S = 8.0
"""Five seconds are promised; the rest is for a machine that has other things to do."""

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scene:
    """A coordinator and two nodes; what b receives of a passes through a relay that can hold it."""

    def __init__(self, made: Cluster, relay: Relay) -> None:
        self.made, self.relay = made, relay

    def begin(self) -> str:
        """A resync of vm1 on b that is in its middle, where it stays until the relay lets it go on."""
        self.relay.hold(HOLD_AFTER_BYTES)
        started = self.made.ask("StartResync", api.StartResyncRequest(volumes=["vm1"]))
        (resync,) = started.resyncs
        assert self.relay.held.wait(60), "the middle is reached"
        wait_for(lambda: self.run(resync.id)["done_bytes"] >= MIB, "what came is told")
        return str(resync.id)

    def run(self, resync_id: str) -> dict[str, Any]:
        return next((run for run in self.made.resyncs("vm1") if run["id"] == resync_id), {"done_bytes": 0})

    def done(self, resync_id: str) -> dict[str, Any]:
        self.relay.release()
        run: dict[str, Any] = wait_for(
            lambda: (found := self.run(resync_id)).get("end_time") and found, f"{resync_id} ends"
        )
        assert run["state"] == "SUCCEEDED", run
        assert identical(self.made.image("a", "vm1"), self.made.image("b", "vm1"))
        return run

    def change(self, seed: int) -> None:
        """Anew all of it, and a CP of that: what the next resync is to bring."""
        images.make(self.made.image("a", "vm1"), SIZE_BYTES, SIZE_BYTES, seed)

    def figures(self, name: str) -> Figures:
        port = self.made.ports[f"{name}-metrics"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            text = page.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.made.log(name).splitlines()]


def of(figures: Figures, name: str, **labels: str) -> float | None:
    return figures.get((name, frozenset(labels.items())))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Scene]:
    with cluster(tmp_path_factory.mktemp("running"), "sqlite") as made:
        made.start_coordinator()
        made.ports["a-stream"] = free_port()
        with Relay(made.ports["a-stream"], 1 << 40) as relay:
            images.make(disk / "a" / "vm1.img", SIZE_BYTES, SIZE_BYTES, seed=1)
            (disk / "b").mkdir()
            made.start_agent("a", {"vm1": disk / "a" / "vm1.img"}, f'stream_advertise = "127.0.0.1:{relay.port}"')
            made.start_agent("b", {"vm1": disk / "b" / "vm1.img"})
            made.wait_reachable("vm1", "a", "b")
            yield Scene(made, relay)


def test_metrics_and_logs_follow_a_resync(scene: Scene) -> None:
    before, b_before = scene.figures("c1"), scene.figures("b")
    assert of(before, "resilver_coordinator_is_leader") == 1
    assert of(before, "resilver_coordinator_leader_changes_total") == 1
    assert of(before, "resilver_store_up") == 1
    assert of(before, "resilver_replica_state", volume="vm1", node="b", state="EMPTY") == 1
    assert of(before, "resilver_node_up", node="b") == 1
    assert of(before, "resilver_elections_total", result="elected") == 0
    assert {of(before, "resilver_resyncs", state=state) for state in ("QUEUED", "TRANSFERRING", "SUCCEEDED")} == {0}
    assert of(b_before, "resilver_agent_coordinator_connected") == 1
    assert not of(b_before, "resilver_agent_received_payload_bytes_total", volume="vm1")

    resync_id = scene.begin()
    during, b_during = scene.figures("c1"), scene.figures("b")
    assert of(during, "resilver_resyncs", state="TRANSFERRING") == 1
    assert of(during, "resilver_resyncs", state="SUCCEEDED") == 0
    assert of(during, "resilver_elections_total", result="elected") == 1
    assert of(during, "resilver_volume_epoch", volume="vm1") == 1
    assert of(during, "resilver_volume_primary_info", volume="vm1", node="a") == 1
    assert of(during, "resilver_resync_duration_seconds_count") == 0
    payload, wire = received(b_during)
    assert MIB <= payload < SIZE_BYTES
    assert payload <= wire <= 2 * HOLD_AFTER_BYTES

    run = scene.done(resync_id)
    wait_for(lambda: of(scene.figures("c1"), "resilver_replica_state", volume="vm1", node="b", state="IN_SYNC"), "told")
    after, b_after = scene.figures("c1"), scene.figures("b")
    finished = {"action": "FULL", "result": "SUCCEEDED", "reason": ""}
    assert of(after, "resilver_resyncs_finished_total", **finished) == 1
    assert of(after, "resilver_resyncs", state="TRANSFERRING") == 0
    assert of(after, "resilver_resyncs", state="SUCCEEDED") == 1
    assert of(after, "resilver_resync_duration_seconds_count") == 1
    assert (of(after, "resilver_resync_duration_seconds_sum") or 0) > 0
    states = {labels: value for (name, labels), value in after.items() if name == "resilver_replica_state"}
    assert sum(value for labels, value in states.items() if ("node", "b") in labels) == 1
    assert of(after, "resilver_replica_behind_cps", volume="vm1", node="b") == 0
    assert of(after, "resilver_replica_common_snapshot", volume="vm1", node="b") == 1
    commits = ("resilver_store_request_duration_seconds_count", {"operation": "commit"})
    assert (of(after, commits[0], **commits[1]) or 0) > (of(before, commits[0], **commits[1]) or 0)
    assert received(b_after)[0] == run["total_bytes"] == SIZE_BYTES
    assert received(b_after)[1] >= SIZE_BYTES
    assert of(b_after, "resilver_agent_resent_bytes_total", volume="vm1") == 0
    assert of(b_after, "resilver_agent_snapshots", volume="vm1") == 1
    taken = of(scene.figures("a"), "resilver_agent_snapshot_duration_seconds_count")
    assert taken == 1
    for name in ("c1", "a", "b"):
        assert any(name == "grpc_server_handled_total" for name, _ in scene.figures(name)), name
    check_logs(scene, resync_id)


def received(figures: Figures) -> tuple[float, float]:
    names = ("resilver_agent_received_payload_bytes_total", "resilver_agent_received_wire_bytes_total")
    payload, wire = (of(figures, name, volume="vm1") or 0 for name in names)
    return payload, wire


def check_logs(scene: Scene, resync_id: str) -> None:
    """Whatever line speaks of a resync, a volume or an order says of which, in fields of their own."""
    lines = {name: scene.lines(name) for name in ("c1", "a", "b")}
    for name, found in lines.items():
        whose = {"coordinator": name} if name == "c1" else {"node": name}
        for line in found:
            assert whose.items() <= line.items(), line
            assert {"timestamp", "level", "logger", "event"} <= line.keys(), line
            if line["event"] == "audit":  # an operator's order, of any number of volumes and resyncs
                assert line["volumes"] == ["vm1"], line
                continue
            if resync_id in json.dumps(line):
                assert {"resync": resync_id, "volume": "vm1", "term": 1}.items() <= line.items(), line
            if "vm1" in json.dumps(line):
                assert line["volume"] == "vm1", line
            if "order" in line or "event_type" in line:
                assert line["term"] == 1, line
    ours = {name: [line for line in found if line.get("resync") == resync_id] for name, found in lines.items()}
    told = [line["event_type"] for line in ours["c1"] if "event_type" in line]
    assert told == ["RESYNC_STARTED", "RESYNC_SUCCEEDED"]
    steps = [line["event"] for line in ours["b"] if line["event"].startswith("resync ")]
    assert steps == [f"resync {step}" for step in ("preparing", "transferring", "verifying", "committing", "succeeded")]
    assert next(line for line in ours["b"] if line["event"] == "resync succeeded")["done_bytes"] == SIZE_BYTES
    assert "Receive" in [line.get("order") for line in ours["b"]]
    assert "PrepareSend" in [line.get("order") for line in ours["a"]]
    assert "stream.connection_opened" in [line["event"] for line in ours["a"]]
    obeyed = [line["order"] for line in lines["a"] if line["event"] == "order obeyed"]
    assert {"OpenEpoch", "TakeSnapshot", "PrepareSend"} <= set(obeyed)


def stopped(scene: Scene, name: str) -> float:
    """SIGTERM; how long it took to end, which must be well."""
    process = scene.made.processes[name].running
    assert process is not None
    begun = time.monotonic()
    process.terminate()
    assert process.wait(STOP_MAX_S) == 0, scene.made.log(name)[-2000:]
    return time.monotonic() - begun


@pytest.mark.parametrize("name", ["b", "a", "c1"])
def test_a_stop_in_the_middle_of_a_transfer_is_soon_over_and_nothing_is_lost(scene: Scene, name: str) -> None:
    """Of the target, of the source, and of the coordinator."""
    scene.change(seed=ord(name[0]))
    resync_id = scene.begin()
    stage = scene.made.records("b", "vm1") / "stage"
    assert stopped(scene, name) < STOP_MAX_S
    assert "Traceback" not in scene.made.log(name)
    assert stage.exists(), "it is kept"
    if name == "c1":
        scene.relay.release()
        wait_for(lambda: not stage.exists(), "the transfer ends without it")
    else:
        assert identical(scene.made.snapshot_data("b", "vm1", tip(scene)), scene.made.image("b", "vm1"))
    scene.relay.release()
    scene.made.restart(name)
    scene.made.wait_reachable("vm1", "a", "b")
    run = scene.done(resync_id)
    assert run["resent_bytes"] == 0
    assert run["wire_bytes"] < SIZE_BYTES + 2 * MIB, "what had come is not asked for again"
    assert of(scene.figures("c1"), "resilver_coordinator_term") == (2 if name == "c1" else 1)


def tip(scene: Scene) -> str:
    """What the records of b say that it is at, whoever runs."""
    return str(scene.made.replicas("vm1")["b"]["snapshot"])
