"""Data that nobody can place: twins without a lineage, another volume's replica, a disk that is not there.

One node has a disk of its own here, whose mount point is the volumes' directory. The store is the embedded one.
"""

from __future__ import annotations

import filecmp
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster, cluster
from tests.loopfs import mounted, needs_root, run

pytestmark = needs_root

IMAGE_BYTES = 16 * MIB
NODES = ("a", "b", "c")
VOLUMES = ("twins", "odd", "solo")


@pytest.fixture(scope="module")
def other_disk() -> Iterator[Path]:
    with mounted("xfs") as point:
        yield point


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, disk: Path, other_disk: Path) -> Iterator[Cluster]:
    """twins: data on a and b. odd: on a and c. solo: on all three. None of it is related to any other."""
    homes = {"a": disk / "a", "b": disk / "b", "c": other_disk}
    for seed, (node, volume) in enumerate((("a", "twins"), ("b", "twins"), ("a", "odd"), ("a", "solo"))):
        images.make(homes[node] / f"{volume}.img", IMAGE_BYTES, IMAGE_BYTES // 4, seed)
    with cluster(tmp_path_factory.mktemp("cluster"), store="sqlite") as made:
        made.start_coordinator()
        for node, home in homes.items():
            made.start_agent(node, {volume: home / f"{volume}.img" for volume in VOLUMES})
        for volume in VOLUMES:
            made.wait_reachable(volume, *NODES)
        made.ok("resync", "odd", "--to", "c")
        made.ok("resync", "solo")
        yield made


def test_twins_without_a_lineage_need_a_choice(mixed: Cluster, disk: Path) -> None:
    cluster = mixed
    live = {node: images.copy(cluster.image(node, "twins"), disk / "kept" / f"twins-{node}") for node in ("a", "b")}
    before = _files(disk)
    (refusal,) = cluster.refused("resync", "twins", reason="AMBIGUOUS").json["refusals"]
    assert refusal["reasons"] == ["AMBIGUOUS"]
    assert refusal["candidates"] == ["a", "b"]
    assert "a " in refusal["message"]
    assert "b " in refusal["message"]
    refused = cluster.refused("elect", "twins", reason="AMBIGUOUS").json
    assert (refused["winner"], refused["refusal"]["candidates"]) == (None, ["a", "b"])
    assert cluster.volume("twins")["state"] == "UNINITIALIZED"
    assert _files(disk) == before

    elected = cluster.ok("elect", "twins", "--choose", "a")
    assert (elected["winner"], elected["epoch"]) == ("a", 1)
    ran = cluster.cli("resync", "twins")
    assert ran.code == 5, ran.err
    assert {run["node"]: run["state"] for run in ran.json["resyncs"]} == {"c": "SUCCEEDED"}
    (refusal,) = ran.json["refusals"]
    assert (refusal["node"], refusal["reasons"]) == ("b", ["REPLICA_UNRELATED"])
    assert refusal["next_command"] == "resilver resync twins --replace b"
    assert filecmp.cmp(cluster.image("b", "twins"), live["b"], shallow=False)

    (run,) = cluster.ok("resync", "twins", "--replace", "b")["resyncs"]
    assert (run["node"], run["state"], run["action"]) == ("b", "SUCCEEDED", "FULL")
    found = cluster.volume("twins")
    assert (found["state"], found["primary"], found["newest_cp"]) == ("HEALTHY", "a", "1-1")
    for node in NODES:
        assert filecmp.cmp(cluster.image(node, "twins"), live["a"], shallow=False), node
    (copy,) = cluster.ok("preserved", "twins")["preserved"]
    assert (copy["node"], copy["live"], [copy["id"]]) == ("b", True, run["preserved"])
    cluster.ok("export", copy["id"], "--node", "b", "--to", str(disk / "kept" / "out"))
    assert filecmp.cmp(disk / "kept" / "out", live["b"], shallow=False)


def test_another_volumes_replica_is_foreign_and_never_touched(mixed: Cluster) -> None:
    cluster = mixed
    assert cluster.replicas("odd")["b"]["state"] == "EMPTY"
    cluster.processes["b"].stop()
    shutil.copy2(cluster.image("b", "solo"), cluster.image("b", "odd"))
    shutil.copytree(cluster.records("b", "solo"), cluster.records("b", "odd"), dirs_exist_ok=True)
    cluster.restart("b")
    cluster.wait_state("odd", "b", "FOREIGN")
    home = cluster.image("b", "odd").parent
    before = _files(home)

    images.write(cluster.image("a", "odd"), images.scattered(IMAGE_BYTES, 20, seed=9), seed=9)
    ran = cluster.cli("resync", "odd")
    assert ran.code == 5, ran.err
    assert {run["node"]: run["state"] for run in ran.json["resyncs"]} == {"c": "SUCCEEDED"}
    (refusal,) = ran.json["refusals"]
    assert (refusal["node"], refusal["reasons"]) == ("b", ["REPLICA_FOREIGN"])
    cluster.refused("resync", "odd", "--to", "b", "--full", reason="REPLICA_FOREIGN")
    cluster.refused("elect", "odd", "--choose", "b", reason="REPLICA_FOREIGN")
    assert cluster.ok("elect", "odd")["winner"] == "a"
    row = cluster.replicas("odd")["b"]
    assert row["state"] == "FOREIGN"
    assert _files(home) == before


def test_an_unmounted_disk_is_lost_and_not_filled(mixed: Cluster, other_disk: Path) -> None:
    cluster = mixed
    device = run("findmnt", "-n", "-o", "SOURCE", other_disk).strip()
    backing = run("losetup", "-n", "-O", "BACK-FILE", device).strip()
    cluster.processes["c"].stop()
    run("umount", other_disk)
    try:
        cluster.restart("c")
        lost = cluster.wait_state("solo", "c", "LOST")
        assert lost["cp"] is None
        images.write(cluster.image("a", "solo"), images.scattered(IMAGE_BYTES, 20, seed=8), seed=8)
        ran = cluster.cli("resync", "solo")
        assert ran.code == 5, ran.err
        assert {one["node"]: one["state"] for one in ran.json["resyncs"]} == {"b": "SUCCEEDED"}
        (refusal,) = ran.json["refusals"]
        assert (refusal["node"], refusal["reasons"]) == ("c", ["REPLICA_LOST"])
        cluster.refused("resync", "solo", "--to", "c", "--full", reason="REPLICA_LOST")
        assert cluster.replicas("solo")["c"]["state"] == "LOST"
        assert list(other_disk.iterdir()) == []
    finally:
        run("mount", "-o", "loop", backing, other_disk)

    # The agent finds it again by itself, and what it lacks is the blocks that changed.
    assert cluster.wait_state("solo", "c", "STALE")["cp"] == "1-1"
    (back,) = cluster.ok("resync", "solo")["resyncs"]
    assert (back["node"], back["action"], back["done_bytes"]) == ("c", "DELTA", 20 * images.BLOCK)
    assert identical(cluster.image("c", "solo"), cluster.image("a", "solo"))


def _files(home: Path) -> dict[str, Any]:
    """Everything below a directory: which file it is, when it was written, and its bytes."""
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        stat = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns if digest else 0, digest)
    return found
