"""Whoever is cut off from whom: only who may act acts, transfers go on by themselves, and all meet again afterwards."""

from __future__ import annotations

import contextlib
import time
import uuid
from pathlib import Path

import grpc
import pytest

from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.v1 import coordinator_pb2 as api
from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.loopfs import needs_root
from tests.partitions.net import needs_network
from tests.partitions.scattered import (
    COORDINATORS,
    IMAGE_BYTES,
    LEASE_TTL_S,
    MEMBERS,
    NODES,
    NOTICED_S,
    VOLUME,
    Scattered,
    Transfer,
    wait_for,
)

pytestmark = [needs_root, needs_network, pytest.mark.timeout(400)]

SLOW_BYTES_S = 2 * MIB
AGAIN_BYTES_MAX = 4 * MIB
TAKE_OVER_S = LEASE_TTL_S + 2.0
SLACK_S = 3.0
"""What a loaded machine may take to see what has happened."""


def other(leader: str) -> str:
    return next(name for name in COORDINATORS if name != leader)


def test_a_coordinator_without_its_store_steps_down_before_another_leads(made: Scattered, tell) -> None:
    old, before = made.leader(), made.epoch
    new, term = other(old), made.term()
    sizes = {name: (made.directory / f"{name}.log").stat().st_size for name in COORDINATORS}
    made.net.cut([old], MEMBERS)
    began = time.monotonic()
    # It leads still, and is told to do something that has to be stored: it is not, and so it is not done.
    with contextlib.suppress(grpc.RpcError):
        made.ask_one(old, "PauseVolume", api.PauseVolumeRequest(request_id=str(uuid.uuid4()), volumes=[VOLUME]))
    seen = []

    def taken_over() -> bool:
        # The old one first: it is never asked later than the new one in one look.
        seen.append((made.leading(old), made.leading(new)))
        return seen[-1][1]

    wait_for(taken_over, "the standby leads", TAKE_OVER_S + SLACK_S)
    tell(f"the standby led {time.monotonic() - began:.1f} s after the leader was cut from its store")
    assert (True, True) not in seen
    ended, led = made.said(old, "the reign has ended", sizes[old]), made.said(new, "leading", sizes[new])
    assert ended[-1]["timestamp"] < led[-1]["timestamp"]
    assert made.term() == term + 1
    # The agents have gone over to the new one, and obey no more what is signed by the old one.
    made.wait_reachable(VOLUME, *NODES)
    for node in NODES:
        assert _order(made, node, term) == "STALE_TERM"
    assert made.refusal(old)
    made.net.heal()
    # What the old one had sent to the store may arrive only now.
    wait_for(lambda: made.host(new) in made.refusal(old), "the old one stands by, and names the new one")
    assert made.volume(VOLUME)["pause"] is None
    assert made.epoch == before
    assert made.leading(new)
    made.write(seed=10)
    made.ok("resync", VOLUME)


def _order(made: Scattered, node: str, term: int) -> str:
    """What an agent answers to an order of that term: the reason of its refusal, empty if it obeys."""
    shown = made.volume(VOLUME)
    cluster = made.ask("GetCluster", api.GetClusterRequest())
    header = agent_pb2.OrderHeader(
        cluster=cluster.cluster, store_id=cluster.store_id, term=term, leader_id=str(uuid.uuid4()), volume=VOLUME,
        volume_id=shown["volume_id"], epoch=shown["epoch"], epoch_id=shown["epoch_id"],
    )  # fmt: skip
    request = agent_pb2.TakeSnapshotRequest(header=header, request_id=str(uuid.uuid4()))
    with grpc.insecure_channel(made.console(node)) as channel:
        try:
            agent_pb2_grpc.AgentStub(channel).TakeSnapshot(request, timeout=20.0)
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
            return next(word for word in ("STALE_TERM", "STALE_EPOCH", "NOT_PRIMARY") if word.encode() in details)
    return ""


def test_an_agent_that_nobody_hears_is_shown_so_and_comes_back_with_what_it_has(made: Scattered, tell) -> None:
    before = made.epoch
    elections = len(made.elections())
    made.net.cut(["b"], COORDINATORS)
    began = time.monotonic()
    wait_for(lambda: not made.replicas(VOLUME)["b"]["reachable"], "b is shown as away", NOTICED_S + SLACK_S)
    tell(f"an agent that is cut off was shown as away after {time.monotonic() - began:.1f} s")
    images.write(made.image("a", VOLUME), images.scattered(IMAGE_BYTES, 100, seed=20), seed=20)
    made.ok("resync", VOLUME, "--to", "c")
    assert made.volume(VOLUME)["replicas"]
    made.net.heal()
    made.wait_reachable(VOLUME, "b")
    made.ok("resync", VOLUME)
    run = next(run for run in made.resyncs(VOLUME) if run["node"] == "b")
    assert (run["action"], run["state"]) == ("DELTA", "SUCCEEDED")
    assert run["total_bytes"] <= MIB
    assert made.epoch == before
    assert len(made.elections()) == elections


def test_a_transfer_needs_no_coordinator(made: Scattered) -> None:
    before = made.epoch
    made.write(seed=30)
    transfer = Transfer(made, "b", bytes_s=SLOW_BYTES_S)
    made.net.cut(["a", "b"], COORDINATORS)
    for node in ("a", "b"):
        made.wait_away(VOLUME, node)
    assert not transfer.on_disk()
    came = transfer.came_bytes
    wait_for(transfer.on_disk, "the transfer ends although no coordinator is in reach")
    assert transfer.came_bytes > came
    assert identical(made.image("a", VOLUME), made.image("b", VOLUME))
    made.net.heal()
    made.wait_state(VOLUME, "b", "IN_SYNC")
    run = transfer.succeeds()
    assert run["resent_bytes"] == 0
    assert run["wire_bytes"] - run["done_bytes"] < MIB
    assert made.epoch == before
    made.ok("resync", VOLUME)


def test_a_transfer_goes_on_from_another_source(made: Scattered, tell) -> None:
    made.write(seed=40)
    made.ok("resync", VOLUME, "--to", "c")
    transfer = Transfer(made, "b", bytes_s=SLOW_BYTES_S)
    wait_for(lambda: set(transfer.from_each()) == {"a", "c"}, "both send")
    made.net.cut(["a"], ["b"])
    began = time.monotonic()
    wait_for(lambda: "a" in transfer.left(), "b leaves a", NOTICED_S + SLACK_S)
    tell(f"a target left a source {time.monotonic() - began:.1f} s after it was cut from it")
    assert not transfer.on_disk()
    run = transfer.succeeds()
    assert run["wire_bytes"] - run["total_bytes"] <= AGAIN_BYTES_MAX


def test_a_transfer_waits_for_its_only_source(made: Scattered, tell) -> None:
    made.write(seed=50)
    transfer = Transfer(made, "b", bytes_s=SLOW_BYTES_S)
    assert set(transfer.from_each()) == {"a"}
    made.net.cut(["a"], ["b"])
    wait_for(transfer.stalled, "nothing comes any more")
    done = transfer.done_bytes()
    assert 0 < done < transfer.shown()["total_bytes"]
    assert transfer.shown()["state"] == "TRANSFERRING"
    assert made.said("b", "stream.source_left")[-1]["source"] == "a"
    made.net.heal()
    made.net.slow("b", SLOW_BYTES_S)
    run = transfer.succeeds()
    tell(f"{transfer.came_bytes - run['total_bytes']:,} bytes beside the data went over the wire to the target")
    assert run["attempt_count"] == 1
    assert run["wire_bytes"] - run["total_bytes"] <= AGAIN_BYTES_MAX
    assert transfer.came_bytes - run["total_bytes"] <= AGAIN_BYTES_MAX
    made.ok("resync", VOLUME)


@pytest.mark.parametrize("alone", ["a", "c"])
def test_of_two_halves_one_acts(made: Scattered, alone: str) -> None:
    """`alone` is with the leader and one member of etcd: the primary, or a secondary."""
    old = made.leader()
    new, term, (epoch, _) = other(old), made.term(), made.epoch
    made.write(seed=60)
    made.ok("snapshot", VOLUME)
    others = tuple(node for node in NODES if node != alone)
    made.net.cut([old, MEMBERS[0], alone], [new, *MEMBERS[1:], *others])
    wait_for(lambda: made.leading(new), "the majority's coordinator leads", TAKE_OVER_S + SLACK_S)
    assert not made.leading(old)
    made.wait_reachable(VOLUME, *others)
    images.write(made.image("a", VOLUME), images.scattered(IMAGE_BYTES, 50, seed=61), seed=61)
    elected, lost = alone == "a", images.copy(made.image("a", VOLUME), made.directory / "lost.img")
    if elected:
        made.refused("elect", VOLUME, reason="PRIMARY_AWAY")
        assert made.ok("elect", VOLUME, "--accept-loss", "a")["winner"] == "b"
        images.write(made.image("b", VOLUME), images.scattered(IMAGE_BYTES, 50, seed=62), seed=62)
    made.ok("resync", VOLUME, "--to", next(node for node in others if node != made.volume(VOLUME)["primary"]))
    # Nobody of the minority decides anything, whoever asks.
    with pytest.raises(grpc.RpcError):
        made.ask_one(old, "ElectPrimary", api.ElectPrimaryRequest(request_id=str(uuid.uuid4()), volume=VOLUME))
    assert not made.leading(old)
    made.net.heal()
    wait_for(lambda: made.host(new) in made.refusal(old), "the old one stands by, and names the new one")
    made.wait_reachable(VOLUME, *NODES)
    made.ok("resync", VOLUME)
    assert made.epoch[0] == epoch + elected
    opened = [one for one in made.elections() if one.epoch > epoch and one.winner]
    assert [one.term > term for one in opened] == [True] * elected
    wait_for(made.in_sync, "the halves are one again")
    assert made.all_identical()
    if elected:
        # What was written to the old primary meanwhile was given up by name, and is kept.
        rows = made.ok("preserved", VOLUME)["preserved"]
        assert {row["node"] for row in rows} == {"a"}
        (live,) = (row for row in rows if row["live"])
        assert identical(Path(live["path"]), lost)
        made.ok("elect", VOLUME, "--choose", "a")
        made.ok("resync", VOLUME)
