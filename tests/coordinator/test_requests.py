"""Nothing that is wrong in a request reaches the engine, and each mistake names its field."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from coordinator import requests
from coordinator.core.claims import Problem
from coordinator.core.cluster import Pause
from coordinator.core.requests import (
    AdoptStoreRequest,
    CancelRequest,
    DropRequest,
    ElectRequest,
    ExportRequest,
    PauseRequest,
    PlanRequest,
    PruneRequest,
    RemoveRequest,
    ResyncRequest,
    SnapshotRequest,
)
from coordinator.requests import Names
from resilver.errors import Invalid, NotFound, Refused
from resilver.v1 import coordinator_pb2 as api

NAMES = Names(("db1", "vm1"), frozenset({"a", "b", "c"}))


def refused(call, field):
    with pytest.raises(Invalid) as caught:
        call()
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.metadata["field"] == field
    return caught.value.message


def test_a_volume_of_another_store_is_refused_with_what_would_have_it():
    problem = Problem("WRONG_STORE", "node a belongs to another store", "resilver store adopt S")
    with pytest.raises(Refused) as caught:
        Names(("db1",), frozenset(), {"vm1": problem}).some_volumes(["db1", "vm1"])
    assert caught.value.reason == "WRONG_STORE"
    assert caught.value.next_command == "resilver store adopt S"


def test_a_resync_comes_through_whole():
    message = api.StartResyncRequest(
        volumes=["vm1", "db1", "vm1"],
        nodes=["b"],
        plan_etag="9f2c41",
        full=True,
        replace_nodes=["c"],
        validate_only=True,
    )
    assert requests.resync(message, NAMES, "ops") == ResyncRequest(
        ("vm1", "db1"), frozenset({"b"}), "9f2c41", True, frozenset({"c"}), True, "ops"
    )
    plan = api.PlanResyncRequest(all=True, take_snapshot=True)
    assert requests.plan(plan, NAMES, "ops") == PlanRequest(("db1", "vm1"), take_snapshot=True, principal="ops")


@pytest.mark.parametrize(
    "ask",
    [
        lambda **kw: requests.resync(api.StartResyncRequest(**kw), NAMES, ""),
        lambda **kw: requests.plan(api.PlanResyncRequest(**kw), NAMES, ""),
        lambda **kw: requests.snapshot(api.CreateSnapshotRequest(**kw), NAMES, ""),
        lambda **kw: requests.pause(api.PauseVolumeRequest(reason="why", **kw), NAMES, "", 0),
        lambda **kw: requests.resume(api.ResumeVolumeRequest(**kw), NAMES, ""),
    ],
)
def test_all_volumes_are_asked_for_in_words(ask):
    assert "set all" in refused(ask, "volumes")
    refused(lambda: ask(volumes=["vm1"], all=True), "all")
    assert ask(all=True).volumes == ("db1", "vm1")
    refused(lambda: ask(volumes=["../etc"]), "volumes[0]")
    refused(lambda: ask(volumes=["vm1"] * 1001), "volumes")
    with pytest.raises(NotFound) as caught:
        ask(volumes=["db1", "vm2"])
    assert caught.value.reason == "VOLUME_NOT_FOUND"
    assert caught.value.metadata["volume"] == "vm2"
    assert "'vm1'" in caught.value.message


def test_nodes_are_known_ones():
    with pytest.raises(NotFound) as caught:
        requests.elect(api.ElectPrimaryRequest(volume="vm1", accept_loss_nodes=["d"]), NAMES, "")
    assert caught.value.reason == "NODE_NOT_FOUND"
    assert caught.value.metadata["node"] == "d"
    refused(
        lambda: requests.resync(api.StartResyncRequest(volumes=["vm1"], replace_nodes=[""]), NAMES, ""),
        "replace_nodes[0]",
    )
    refused(lambda: requests.elect(api.ElectPrimaryRequest(), NAMES, ""), "volume")


def test_an_election_names_its_volume_and_whose_loss_is_accepted():
    message = api.ElectPrimaryRequest(
        volume="vm1", choose_node="b", accept_loss_nodes=["a", "c"], etag="e", validate_only=True
    )
    assert requests.elect(message, NAMES, "ops") == ElectRequest("vm1", "b", frozenset({"a", "c"}), True, "e", "ops")
    refused(lambda: requests.elect(api.ElectPrimaryRequest(volume="vm1", etag="e" * 200), NAMES, ""), "etag")


def test_snapshots():
    assert requests.snapshot(api.CreateSnapshotRequest(volumes=["vm1"], note="n"), NAMES, "ops") == SnapshotRequest(
        ("vm1",), "n", principal="ops"
    )
    refused(lambda: requests.snapshot(api.CreateSnapshotRequest(volumes=["vm1"], note="n" * 1025), NAMES, ""), "note")
    assert requests.drop(api.DeleteSnapshotRequest(id="s1", nodes=["a"]), NAMES, "ops") == DropRequest(
        "s1", frozenset({"a"}), principal="ops"
    )
    refused(lambda: requests.drop(api.DeleteSnapshotRequest(id="../s1"), NAMES, ""), "id")
    assert requests.prune(api.PruneSnapshotsRequest(volume="vm1", keep_last=3), NAMES, "ops") == PruneRequest(
        "vm1", 3, principal="ops"
    )
    refused(lambda: requests.prune(api.PruneSnapshotsRequest(volume="vm1", keep_last=10_001), NAMES, ""), "keep_last")
    assert requests.cancel(api.CancelResyncRequest(id="r1", discard_stage=True), "ops") == CancelRequest(
        "r1", True, "ops"
    )
    refused(lambda: requests.cancel(api.CancelResyncRequest(), ""), "id")


@pytest.mark.parametrize("path", ["", "x", "./x", "/", "/a/../b", "/a/./b", "//a", "/a/", "/a\0b", "/" + "x" * 4096])
def test_a_path_is_absolute_and_says_where_it_leads(path):
    message = api.ExportSnapshotRequest(id="s1", node="a", path=path)
    refused(lambda: requests.export(message, NAMES, ""), "path")


def test_an_export_comes_through_whole():
    message = api.ExportSnapshotRequest(id="s1", node="a", path="/srv/x.img", writable=True)
    assert requests.export(message, NAMES, "ops") == ExportRequest("s1", "a", "/srv/x.img", True, "ops")


def test_a_pause_says_why_and_how_long():
    message = api.PauseVolumeRequest(volumes=["vm1"], reason="backup", pause_duration=Duration(seconds=90))
    assert requests.pause(message, NAMES, "ops", 1000) == PauseRequest(("vm1",), Pause("backup", 91_000, "ops"), "ops")
    forever = api.PauseVolumeRequest(volumes=["vm1"], reason="backup")
    assert requests.pause(forever, NAMES, "ops", 1000).pause.until_ms is None
    refused(lambda: requests.pause(api.PauseVolumeRequest(volumes=["vm1"], reason=" "), NAMES, "", 0), "reason")
    for duration in (Duration(), Duration(seconds=-5), Duration(seconds=11 * 365 * 24 * 3600)):
        message = api.PauseVolumeRequest(volumes=["vm1"], reason="x", pause_duration=duration)
        refused(lambda message=message: requests.pause(message, NAMES, "", 0), "pause_duration")
    assert requests.resume(api.ResumeVolumeRequest(volumes=["vm1"]), NAMES, "ops") == PauseRequest(
        ("vm1",), None, "ops"
    )


def test_removals_name_what_goes():
    assert requests.remove_replica(api.RemoveReplicaRequest(volume="vm1", node="c", etag="e"), NAMES, "ops") == (
        RemoveRequest("vm1", "c", "e", principal="ops")
    )
    assert requests.remove_node(api.RemoveNodeRequest(node="c"), NAMES, "ops") == RemoveRequest(
        node="c", principal="ops"
    )
    assert requests.remove_volume(api.RemoveVolumeRequest(volume="vm1"), NAMES, "ops") == RemoveRequest(
        "vm1", principal="ops"
    )
    refused(lambda: requests.remove_replica(api.RemoveReplicaRequest(volume="vm1"), NAMES, ""), "node")
    refused(lambda: requests.remove_node(api.RemoveNodeRequest(), NAMES, ""), "node")
    assert requests.adopt_store(api.AdoptStoreRequest(store_id="st1"), "ops") == AdoptStoreRequest("st1", "ops")
    refused(lambda: requests.adopt_store(api.AdoptStoreRequest(), ""), "store_id")


def test_a_request_id_is_a_uuid_or_nothing():
    identity = "0B5C9D0E-1111-4222-8333-444455556666"
    assert requests.check_request_id(identity) == identity.lower()
    assert requests.check_request_id("") == ""
    for wrong in ("1", "0b5c9d0e111142228333444455556666", f"{{{identity}}}", f"urn:uuid:{identity}", identity + "x"):
        refused(lambda wrong=wrong: requests.check_request_id(wrong), "request_id")


def test_an_origin_of_no_meaning_is_refused():
    refused(lambda: requests.check_origins([0]), "origins[0]")
    assert len(requests.check_origins([1, 2, 1])) == 2
