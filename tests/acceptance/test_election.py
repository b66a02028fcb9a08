"""The primary goes away with what only it has: refused, accepted by name, and everything kept when it comes back."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images
from tests.acceptance.images import BLOCK, MIB, identical
from tests.cluster import Cluster
from tests.loopfs import needs_root

pytestmark = needs_root

IMAGE_BYTES = 64 * MIB
NODES = ("a", "b", "c")
VOLUMES = ("judged", "quiet", "written")


@dataclass(frozen=True)
class Parted:
    """a has 1-3, 1-4 and live writes that nobody else has; b is at 1-2, c at 1-1. a is stopped."""

    cluster: Cluster
    kept: Path
    """What a had: `<volume>-live`, `<volume>-1-3`, `<volume>-1-4`."""


@pytest.fixture(scope="module")
def parted(trio: Cluster, disk: Path) -> Parted:
    kept = disk / "kept"
    places = {node: {volume: disk / node / f"{volume}.img" for volume in VOLUMES} for node in NODES}
    for node in NODES:
        (disk / node).mkdir()
    for seed, volume in enumerate(VOLUMES):
        images.make(places["a"][volume], IMAGE_BYTES, IMAGE_BYTES // 4, seed)
    for node in NODES:
        trio.start_agent(node, places[node])
    trio.wait_reachable("judged", *NODES)
    trio.ok("resync", "--all")
    trio.processes["c"].stop()
    _write(trio, seed=20)
    trio.ok("resync", "--all", "--to", "b")
    trio.restart("c")
    for seed in (30, 40):
        _write(trio, seed)
        for point in trio.ok("snapshot", "--all")["snapshots"]:
            name, cp = point["volume"], point["cp"]
            images.copy(trio.snapshot_data("a", name, point["id"]), kept / f"{name}-{cp}")
    _write(trio, seed=50)
    trio.wait_reachable("judged", *NODES)
    for volume in VOLUMES:
        images.copy(trio.image("a", volume), kept / f"{volume}-live")
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        f"{volume}-{what}" for volume in VOLUMES for what in ("1-3", "1-4", "live")
    )
    _stop_a(trio)
    return Parted(trio, kept)


def _write(cluster: Cluster, seed: int) -> None:
    for volume in VOLUMES:
        images.write(cluster.image("a", volume), images.scattered(IMAGE_BYTES, 50, seed), seed)


def _stop_a(cluster: Cluster) -> None:
    if cluster.processes["a"].running is not None:
        cluster.processes["a"].stop()
        cluster.wait_away("judged", "a")


def _facts(cluster: Cluster, volume: str) -> Any:
    """What a refusal may not change."""
    found = cluster.volume(volume)
    rows = {
        row["node"]: {key: row[key] for key in ("role", "state", "cp", "snapshot", "live")} for row in found["replicas"]
    }
    return {key: found[key] for key in ("state", "epoch", "primary", "newest_cp")}, rows


def test_an_absent_primary_is_given_up_by_name_or_not_at_all(parted: Parted) -> None:
    cluster = parted.cluster
    _stop_a(cluster)
    before = _facts(cluster, "judged")
    assert before[0] == {"state": "BLOCKED", "epoch": 1, "primary": "a", "newest_cp": "1-4"}

    (refusal,) = cluster.refused("resync", "judged", reason="PRIMARY_AWAY").json["refusals"]
    assert refusal["volume"] == "judged"
    assert "PRIMARY_AWAY" in refusal["reasons"]
    assert "the primary a" in refusal["message"]
    assert "1-4" in refusal["message"]
    assert refusal["next_command"] == "resilver elect judged --accept-loss a"

    for words in ((), ("--accept-loss", "b"), ("--accept-loss", "a", "--accept-loss", "b"), ("--choose", "b")):
        refused = cluster.refused("elect", "judged", *words, reason="PRIMARY_AWAY").json
        assert (refused["winner"], refused["epoch"]) == (None, 0)
        assert [loss["node"] for loss in refused["refusal"]["losses"]] == ["a"]
        assert refused["refusal"]["losses"][0]["to_cp"] == "1-4"
    assert _facts(cluster, "judged") == before

    elected = cluster.ok("elect", "judged", "--accept-loss", "a")
    assert (elected["winner"], elected["epoch"], elected["previous_primary"]) == ("b", 2, "a")
    assert elected["accepted_losses"] == ["a"]
    after, rows = _facts(cluster, "judged")
    assert (after["epoch"], after["primary"], after["newest_cp"]) == (2, "b", "2-3")
    assert (rows["b"]["role"], rows["b"]["cp"], rows["b"]["state"]) == ("PRIMARY", "2-3", "IN_SYNC")
    assert identical(cluster.image("b", "judged"), cluster.snapshot_data("b", "judged", rows["b"]["snapshot"]))
    told = cluster.ok("history", "judged")["history"]
    assert told[0]["winner"] == "b"
    assert sum(one["refusal"] is not None for one in told) == 5


@pytest.mark.parametrize("volume", ["quiet", "written"])
def test_the_old_primary_comes_back_as_diverged_and_loses_nothing(parted: Parted, volume: str) -> None:
    """`quiet`: nothing was written on the new primary, which is then two sequences behind the old one."""
    cluster = parted.cluster
    _stop_a(cluster)
    cluster.ok("elect", volume, "--accept-loss", "a")
    if volume == "written":
        images.write(cluster.image("b", volume), images.scattered(IMAGE_BYTES, 30, seed=60), seed=60)
    cluster.restart("a")
    diverged = cluster.wait_state(volume, "a", "DIVERGED")
    assert (diverged["cp"], diverged["own_cps"]) == ("1-4", 2)
    elected = cluster.ok("elect", volume)
    assert (elected["winner"], elected["epoch"]) == ("b", 2)

    (plan,) = cluster.ok("plan", volume)["volumes"]
    assert (plan["primary"], plan["takes_snapshot"]) == ("b", volume == "written")
    row = next(one for one in plan["replicas"] if one["node"] == "a")
    assert (row["state"], row["action"], row["base_cp"]) == ("DIVERGED", "DELTA", "1-2")
    assert row["preserve"] == ["1-3, 1-4", "live writes"]
    # 1-3 and 1-4 differ from 1-2 in the blocks of two seeds, the live copy from 1-4 in those of one.
    blocks = {*images.scattered(IMAGE_BYTES, 50, 30), *images.scattered(IMAGE_BYTES, 50, 40)}
    assert row["preserve_bytes"] == (len(blocks) + 50) * BLOCK

    runs = {run["node"]: run for run in cluster.ok("resync", volume)["resyncs"]}
    assert {node: run["state"] for node, run in runs.items()} == {"a": "SUCCEEDED", "c": "SUCCEEDED"}
    found = cluster.volume(volume)
    assert (found["state"], found["primary"], found["epoch"]) == ("HEALTHY", "b", 2)
    (tip,) = {one["snapshot"] for one in found["replicas"]}
    for node in NODES:
        assert identical(cluster.image("b", volume), cluster.image(node, volume)), node
        assert identical(cluster.image("b", volume), cluster.snapshot_data(node, volume, tip)), node
    _check_preserved(parted, volume, runs["a"])


def _check_preserved(parted: Parted, volume: str, run: Any) -> None:
    """Both snapshots off the lineage and the live copy are listed, and come out as they were."""
    cluster = parted.cluster
    copies = cluster.ok("preserved", volume)["preserved"]
    assert {copy["id"] for copy in copies} == set(run["preserved"])
    assert {copy["node"] for copy in copies} == {"a"}
    assert {copy["resync"] for copy in copies} == {run["id"]}
    named = {"live" if copy["live"] else copy["cp"]: copy for copy in copies}
    assert set(named) == {"1-3", "1-4", "live"}
    for name, copy in named.items():
        out = parted.kept / f"{volume}-{name}-out"
        answer = cluster.ok("export", copy["id"], "--node", "a", "--to", str(out))
        assert (answer["path"], answer["size_bytes"]) == (str(out), IMAGE_BYTES)
        assert filecmp.cmp(out, parted.kept / f"{volume}-{name}", shallow=False), name
