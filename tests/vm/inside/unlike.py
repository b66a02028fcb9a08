"""Three unlike replicas of one volume, in a real cluster: an image on XFS, an image on ext4, a thin volume."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import agent.app
import coordinator.app
import resilver.cli.main  # noqa: F401  # what is forked is loaded before
from tests import cluster as clusters
from tests.cluster import Cluster
from tests.loopfs import mounted
from tests.vm.inside import forked
from tests.vm.inside.node import CHUNK, GROUP, make_group, noise, run

SIZE = 16 << 20
SLOW_S = 600.0
NODES = ("a", "b", "c")
THIN = "three"


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A coordinator with sqlite and three agents; `a` is the primary to be."""
    assert agent.app.main
    assert coordinator.app.main
    loopback_up()
    make_group()
    monkeypatch.setattr(clusters, "subprocess", forked)
    monkeypatch.setattr(clusters.wait_for, "__defaults__", (SLOW_S, 0.5))
    with mounted("xfs", 320 << 20) as xfs, mounted("ext4", 400 << 20) as ext4:
        live = xfs / "vm1.img"
        live.write_bytes(bytes(SIZE))
        write(live, 0, noise(1, 1_000_000))
        write(live, SIZE // 2, noise(2, 2_000_000))
        with clusters.cluster(tmp_path, store="sqlite") as made:
            # Its kernel is emulated: what takes a moment elsewhere takes half a minute here.
            made.start_coordinator(extra="examine_timeout_s = 300\nnode_timeout_s = 120\n")
            made.start_agent("a", {"vm1": live})
            made.start_agent("b", {"vm1": ext4 / "vm1.img"})
            config = made.agent_config("c", {"vm1": Path(GROUP) / "pool" / THIN}, backend="lvm-thin")
            config.write_text(config.read_text() + f'snapshot_dir = "{tmp_path}/records"\n')
            made.process("c", sys.executable, "-m", "agent.app", "--config", str(config))
            made.wait_reachable("vm1", *NODES)
            yield made


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)
        fcntl.ioctl(sock, 0x8914, request)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def paths(cluster: Cluster) -> list[Path]:
    return [cluster.image("a", "vm1"), cluster.image("b", "vm1"), Path(f"/dev/{GROUP}/{THIN}")]


def all_the_same(cluster: Cluster) -> None:
    one, *others = paths(cluster)
    for other in others:
        run("cmp", one, other)
    rows = cluster.replicas("vm1")
    assert {row["cp"] for row in rows.values()} == {rows["a"]["cp"]}


def resynced(cluster: Cluster) -> dict[str, dict]:
    runs = {run["node"]: run for run in cluster.ok("resync", "vm1", timeout_s=SLOW_S)["resyncs"]}
    assert {run["state"] for run in runs.values()} == {"SUCCEEDED"}
    return runs


def test_three_unlike_replicas(trio: Cluster) -> None:
    """First copy, stale, diverged; then the thin volume is the source for the other two."""
    first = resynced(trio)
    assert set(first) == {"b", "c"}
    all_the_same(trio)

    live = trio.image("a", "vm1")
    write(live, 3 * CHUNK, noise(3, 50_000))
    write(live, SIZE - 4096, noise(4, 4096))
    stale = resynced(trio)
    assert {node: run["done_bytes"] < 4 * CHUNK for node, run in stale.items()} == {"b": True, "c": True}
    all_the_same(trio)

    thin = Path(f"/dev/{GROUP}/{THIN}")
    write(thin, 5 * CHUNK, b"own data of the thin replica")
    lost = thin.read_bytes()
    write(live, 7 * CHUNK, noise(5, 50_000))
    diverged = resynced(trio)
    assert diverged["c"]["done_bytes"] < 4 * CHUNK
    all_the_same(trio)
    (copy,) = [copy for copy in trio.ok("preserved", "vm1")["preserved"] if copy["node"] == "c"]
    run("lvchange", "-ay", "-K", copy["path"].removeprefix("/dev/"))
    assert Path(copy["path"]).read_bytes() == lost
    assert os.path.ismount(trio.directory / "records")
