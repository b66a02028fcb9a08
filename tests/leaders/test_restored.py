"""A store that was restored from a backup knows less than the nodes: nothing is elected below what the data proves.

It follows docs/store.md, step by step.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted, needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]

NODES = ("a", "b", "c")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with mounted("xfs", 1 << 30) as disk, cluster(tmp_path) as made:
        made.lease_ttl_s = 3
        made.start_coordinator()
        images.make(disk / "a" / "vm1.img", 8 * MIB, 4 * MIB, seed=1)
        for node in NODES:
            (disk / node).mkdir(exist_ok=True)
            made.start_agent(node, {"vm1": disk / node / "vm1.img"})
        made.wait_reachable("vm1", *NODES)
        made.ok("resync", "vm1")
        yield made


def etcdctl(made: Cluster, *arguments: str | Path) -> None:
    endpoint = f"--endpoints=127.0.0.1:{made.ports['etcd']}"
    command = ["etcdctl", endpoint, *map(str, arguments)]
    subprocess.run(command, check=True, timeout=30, capture_output=True, env={"ETCDCTL_API": "3", "PATH": "/usr/bin"})


def restore(made: Cluster, backup: Path) -> None:
    """What the page says: the coordinator stopped, every member made anew from the one file, then all started."""
    data = made.directory / "etcd"
    shutil.rmtree(data)
    peer = f"http://127.0.0.1:{made.ports['etcd-peer']}"
    etcdctl(
        made, "snapshot", "restore", backup, "--data-dir", data,
        "--name", "e1", "--initial-cluster", f"e1={peer}", "--initial-advertise-peer-urls", peer,
    )  # fmt: skip


def test_what_the_nodes_know_counts_and_not_what_the_backup_says(three: Cluster, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"
    etcdctl(three, "snapshot", "save", backup)
    kept = three.volume("vm1")
    assert (kept["epoch"], kept["primary"]) == (1, "a")

    # After the backup: c is away, a dies and is given up, b becomes the primary, and its points are acknowledged.
    three.processes["c"].stop()
    three.processes["a"].kill()
    three.wait_away("vm1", "a")
    three.wait_away("vm1", "c")
    elected = three.ok("elect", "vm1", "--accept-loss", "a")
    assert (elected["winner"], elected["epoch"]) == ("b", 2)
    images.write(three.image("b", "vm1"), [0, 16 * images.BLOCK], seed=5)
    (newest,) = three.ok("snapshot", "vm1")["snapshots"]

    for name in ("b", "c1"):
        three.processes[name].stop()
    three.processes["etcd"].kill()
    restore(three, backup)
    for name in ("etcd", "c1"):
        three.restart(name)

    # The stale one reports first, and the store would have it: what it holds is the newest point that is known there.
    three.restart("c")
    three.wait_reachable("vm1", "c")
    assert three.volume("vm1")["epoch"] == 1
    three.refused("elect", "vm1", reason="PRIMARY_AWAY")

    # Who knows more comes: the epoch goes up, never down, and the next election wants everybody.
    three.restart("b")
    wait_for(lambda: three.volume("vm1").get("epoch") == elected["epoch"], "the epoch is what b proves")
    raised = three.volume("vm1")
    assert (raised["state"], raised["newest_cp"]) == ("RECOVERING", newest["cp"])
    assert "RECOVERING" in [event["type"] for event in three.ok("events")["events"]]
    three.refused("elect", "vm1", reason="RECOVERING")
    three.restart("a")
    three.wait_reachable("vm1", *NODES)
    after = three.ok("elect", "vm1")
    assert after["winner"] == "b"
    assert after["epoch"] >= elected["epoch"]
    three.ok("resync", "vm1")
    assert all(newest["id"] in held(three, node) for node in NODES)
    assert all(identical(three.image("b", "vm1"), three.image(node, "vm1")) for node in "ac")
    assert three.volume("vm1")["state"] == "HEALTHY"


def held(made: Cluster, node: str) -> list[str]:
    return [entry.name for entry in made.records(node, "vm1").iterdir() if (entry / "record.json").exists()]
