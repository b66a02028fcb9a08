"""One node misses three consistency points of a 4 GiB volume: only what changed moves, and the plan says how much."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance import images
from tests.acceptance.images import BLOCK, identical
from tests.cluster import Cluster
from tests.loopfs import needs_root

pytestmark = needs_root

IMAGE_BYTES = 4 << 30
DATA_BYTES = 256 << 20
CHANGED_BLOCKS = IMAGE_BYTES // BLOCK // 100  # 10,485: 1 %
CHANGED_BYTES = CHANGED_BLOCKS * BLOCK
NODES = ("a", "b", "c")


@pytest.fixture(scope="module")
def mirrored(trio: Cluster, disk: Path) -> Cluster:
    """A volume that is the same on three nodes."""
    for node in NODES:
        (disk / node).mkdir()
    images.make(disk / "a" / "vm1.img", IMAGE_BYTES, DATA_BYTES, seed=1, stripe_bytes=4 << 20)
    for node in NODES:
        trio.start_agent(node, {"vm1": disk / node / "vm1.img"})
    trio.wait_reachable("vm1", *NODES)
    trio.ok("resync", "vm1")
    return trio


def test_a_node_that_missed_three_points_gets_their_blocks_and_no_more(mirrored: Cluster) -> None:
    cluster, live = mirrored, mirrored.image("a", "vm1")
    offsets = images.scattered(IMAGE_BYTES, CHANGED_BLOCKS, seed=2)
    cluster.processes["c"].stop()
    for missed in range(3):
        images.write(live, offsets[missed::4], seed=10 + missed)
        cluster.ok("snapshot", "vm1")
    cluster.restart("c")
    behind = cluster.wait_state("vm1", "c", "STALE")
    assert behind["cp"] == "1-1"
    assert behind["behind_cps"] == 3
    # What is written since then belongs to the point that the plan takes.
    images.write(live, offsets[3::4], seed=13)

    (plan,) = cluster.ok("plan", "vm1", "--snapshot")["volumes"]
    assert plan["target_cp"] == "1-5"
    planned = {row["node"]: row for row in plan["replicas"]}
    for row in planned.values():
        assert (row["action"], row["base_cp"], row["exact"]) == ("DELTA", "1-1", True)
        assert (row["bytes"], row["range_count"]) == (CHANGED_BYTES, CHANGED_BLOCKS)

    runs = {run["node"]: run for run in cluster.ok("resync", "vm1")["resyncs"]}
    assert set(runs) == {"b", "c"}
    for node, run in runs.items():
        assert run["state"] == "SUCCEEDED"
        assert run["done_bytes"] == planned[node]["bytes"]
        assert run["range_count"] == planned[node]["range_count"]
        assert run["done_bytes"] <= 1.05 * CHANGED_BYTES
        assert run["wire_bytes"] <= 1.03 * run["done_bytes"]
        assert run["resent_bytes"] == 0

    volume = cluster.volume("vm1")
    assert volume["state"] == "HEALTHY"
    (tip,) = {row["snapshot"] for row in volume["replicas"]}
    for node in NODES:
        assert identical(live, cluster.snapshot_data(node, "vm1", tip)), f"tip on {node}"
        assert identical(live, cluster.image(node, "vm1")), f"live copy on {node}"


def test_the_same_again_moves_nothing(mirrored: Cluster) -> None:
    assert mirrored.ok("resync", "vm1") == {"resyncs": [], "refusals": []}
    (plan,) = mirrored.ok("plan", "vm1", "--snapshot")["volumes"]
    assert {row["action"] for row in plan["replicas"]} == {"NONE"}
    assert not plan["takes_snapshot"]


def test_every_node_that_has_the_point_is_a_source(mirrored: Cluster) -> None:
    cluster, live = mirrored, mirrored.image("a", "vm1")
    offsets = images.scattered(IMAGE_BYTES, 2_000, seed=3)
    images.write(live, offsets, seed=30)
    (first,) = cluster.ok("resync", "vm1", "--to", "b")["resyncs"]
    assert [source["node"] for source in first["sources"]] == ["a"]
    (plan,) = cluster.ok("plan", "vm1", "--to", "c")["volumes"]
    (row,) = plan["replicas"]
    assert (row["sources"], row["bytes"], row["range_count"]) == (["a", "b"], len(offsets) * BLOCK, len(offsets))
    (run,) = cluster.ok("resync", "vm1")["resyncs"]
    assert (run["node"], run["state"], run["done_bytes"]) == ("c", "SUCCEEDED", row["bytes"])
    assert {source["node"] for source in run["sources"]} == {"a", "b"}
    assert sum(source["wire_bytes"] for source in run["sources"]) == run["wire_bytes"]
    assert identical(live, cluster.image("c", "vm1"))
