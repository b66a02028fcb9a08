"""A resync from beginning to end through a client that has no file of the project: reflection alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.acceptance.reflection_client import Failed, ReflectionClient
from tests.cluster import Cluster
from tests.loopfs import needs_root

pytestmark = needs_root

IMAGE_BYTES = 32 * MIB
VERSIONS = ("v1", "v1alpha")
COORDINATOR = "resilver.v1.Coordinator"


@pytest.fixture(scope="module")
def pair(trio: Cluster, disk: Path) -> Cluster:
    """Two nodes, and a volume for each version of reflection that is on one of them so far."""
    for version in VERSIONS:
        images.make(disk / "a" / f"{version}.img", IMAGE_BYTES, IMAGE_BYTES // 4, seed=1)
    (disk / "b").mkdir()
    for node in ("a", "b"):
        trio.start_agent(node, {version: disk / node / f"{version}.img" for version in VERSIONS})
    trio.wait_reachable("v1", "a", "b")
    return trio


def _client(cluster: Cluster, process: str, version: str) -> Iterator[ReflectionClient]:
    with grpc.insecure_channel(f"127.0.0.1:{cluster.ports[process]}") as channel:
        yield ReflectionClient(channel, f"grpc.reflection.{version}.ServerReflection")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(pair: Cluster, version: str) -> Iterator[ReflectionClient]:
    yield from _client(pair, "c1", version)


def test_a_resync_from_its_plan_to_its_end(pair: Cluster, client: ReflectionClient, version: str) -> None:
    assert {COORDINATOR, "grpc.health.v1.Health"} <= client.services()
    serving = client.call("grpc.health.v1.Health/Check", {"service": COORDINATOR})
    assert serving == {"status": "SERVING"}

    listed = client.call(f"{COORDINATOR}/ListVolumes")["volumes"]
    assert version in [volume["name"] for volume in listed]
    volume = client.call(f"{COORDINATOR}/GetVolume", {"volume": version})["volume"]
    assert volume["state"] == "VOLUME_STATE_UNINITIALIZED"
    assert {row["node"]: row["live"]["state"] for row in volume["replicas"]} == {
        "a": "LIVE_STATE_MODIFIED",
        "b": "LIVE_STATE_ABSENT",
    }

    plan = client.call(f"{COORDINATOR}/PlanResync", {"volumes": [version]})["plan"]
    (planned,) = plan["volumes"]
    assert (planned["primary"], planned["targetCp"]["text"], planned["takesSnapshot"]) == ("a", "1-1", True)
    assert [(row["node"], row["action"]) for row in planned["replicas"]] == [("b", "PLAN_ACTION_FULL")]

    started = client.call(f"{COORDINATOR}/StartResync", {"volumes": [version], "planEtag": plan["etag"]})
    (resync,) = started["resyncs"]
    assert "refusals" not in started
    seen = [
        run for answer in client.stream(f"{COORDINATOR}/WatchResyncs", {"ids": [resync["id"]]})
        for run in answer.get("resyncs", ())
    ]  # fmt: skip
    assert seen[-1]["state"] == "RESYNC_STATE_SUCCEEDED"
    assert seen[-1]["doneBytes"] == str(IMAGE_BYTES // 4)
    done = [int(run.get("doneBytes", 0)) for run in seen]
    assert done == sorted(done)

    volume = client.call(f"{COORDINATOR}/GetVolume", {"volume": version})["volume"]
    assert (volume["state"], volume["newestCp"]["text"]) == ("VOLUME_STATE_HEALTHY", "1-1")
    assert identical(pair.image("a", version), pair.image("b", version))


def test_errors_carry_details_that_reflection_describes(client: ReflectionClient) -> None:
    with pytest.raises(Failed) as caught:
        client.call(f"{COORDINATOR}/GetVolume", {"volume": "v2"})
    failed = caught.value
    assert (failed.code, "v1" in failed.message) == ("NOT_FOUND", True)
    info = failed.details["google.rpc.ErrorInfo"]
    assert (info["reason"], info["domain"], info["metadata"]["volume"]) == ("VOLUME_NOT_FOUND", "resilver", "v2")
    assert failed.details["google.rpc.ResourceInfo"]["resourceName"] == "v2"

    with pytest.raises(Failed) as caught:
        client.call(f"{COORDINATOR}/PlanResync", {})
    failed = caught.value
    assert failed.code == "INVALID_ARGUMENT"
    assert failed.details["google.rpc.ErrorInfo"]["reason"] == "INVALID_FIELD"
    (violation,) = failed.details["google.rpc.BadRequest"]["fieldViolations"]
    assert violation["field"] == "volumes"


def test_an_agent_shows_its_own_truth(pair: Cluster, version: str) -> None:
    for client in _client(pair, "a", version):
        assert {"resilver.v1.Agent", "resilver.v1.Peer"} <= client.services()
        agent = client.call("resilver.v1.Agent/GetAgent")
        assert agent["node"] == "a"
        looked = client.call("resilver.v1.Agent/ExamineReplica", {"volume": version})
        assert looked["replica"]["presence"] == "PRESENCE_PRESENT"
        assert looked["replica"]["live"]["path"] == str(pair.image("a", version))
