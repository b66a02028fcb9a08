"""A pair that a script has made with plain `zfs send` and `zfs receive`: five snapshots here, three of them there.

The first resync starts from the newest in common; what the script has made stays exactly what it was.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import zfsfs
from tests.cluster import Cluster, cluster
from tests.loopfs import run
from tests.zfsfs import needs_zfs

pytestmark = [needs_zfs, pytest.mark.timeout(600)]

VOLUME = "home"
WHOLE_BYTES = 8 << 20
CHANGE_BYTES = 300_000


class Script:
    """What ran from cron until now: `@auto-N` on the dataset, the first three of them on the backup too."""

    def __init__(self, first: str, backup: str, point: Path) -> None:
        self.here, self.there, self.live = f"{first}/{VOLUME}", f"{backup}/{VOLUME}", point
        zfsfs.zfs("create", "-o", f"mountpoint={point}", "-o", "atime=off", self.here)
        (point / "whole").write_bytes(os.urandom(WHOLE_BYTES))
        for number in range(1, 6):
            (point / f"change {number}").write_bytes(os.urandom(CHANGE_BYTES))
            zfsfs.zfs("snapshot", f"{self.here}@auto-{number}")
            if number <= 3:
                self._send(number)
        (point / "since then").write_bytes(os.urandom(CHANGE_BYTES))

    def _send(self, number: int) -> None:
        base = ["-i", f"@auto-{number - 1}"] if number > 1 else []
        with subprocess.Popen(["zfs", "send", *base, f"{self.here}@auto-{number}"], stdout=subprocess.PIPE) as sending:
            subprocess.run(["zfs", "receive", "-u", self.there], stdin=sending.stdout, check=True, timeout=60)
        assert sending.returncode == 0

    def seen(self) -> list[str]:
        """The snapshots of theirs, by guid, with every property that one can have set."""
        told = zfsfs.zfs("list", "-H", "-t", "snapshot", "-o", "name,guid,creation,userrefs")
        mine = [line for line in told.splitlines() if line.startswith((f"{self.here}@auto-", f"{self.there}@auto-"))]
        names = [line.split("\t")[0] for line in mine]
        return mine + zfsfs.zfs("get", "-H", "-s", "local", "all", *names).splitlines()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    with zfsfs.running() as service, service.pool() as first, service.pool() as backup:
        yield Script(first, backup, tmp_path_factory.mktemp("live") / "point")


@pytest.fixture(scope="module")
def pair(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    work = tmp_path_factory.mktemp("records")
    with cluster(tmp_path_factory.mktemp("cluster"), "sqlite") as made:
        made.start_coordinator()
        for node, dataset in (("a", script.here), ("b", script.there)):
            where = f'snapshot_dir = "{work / node}"'
            made.start_agent(node, {VOLUME: Path(dataset)}, volume_extra=where, backend="zfs")
        made.wait_reachable(VOLUME, "a", "b")
        yield made


def test_a_pair_is_taken_over_by_a_delta_and_nothing_of_theirs_is_touched(
    pair: Cluster, script: Script, tmp_path: Path
) -> None:
    before = script.seen()
    assert len(before) == 8
    (planned,) = pair.ok("plan", VOLUME)["volumes"]
    (row,) = planned["replicas"]
    assert (planned["primary"], planned["target_cp"], planned["takes_snapshot"]) == ("a", "1-1", True)
    assert (row["node"], row["state"], row["action"]) == ("b", "STALE", "DELTA")
    assert (row["base_cp"], row["base_name"]) == (None, "auto-3")
    assert script.seen() == before, "a plan moves nothing"

    (done,) = pair.ok("resync", VOLUME, timeout_s=200)["resyncs"]
    assert (done["state"], done["action"]) == ("SUCCEEDED", "DELTA")
    assert 2 * CHANGE_BYTES < done["done_bytes"] < WHOLE_BYTES / 2, "what came since auto-3, and nothing else"
    pair.wait_state(VOLUME, "b", "IN_SYNC")
    out = tmp_path / "out"
    pair.ok("export", done["plan"]["target"], "--node", "b", "--to", str(out))
    assert run("rsync", "-nacAXH", "--delete", "--itemize-changes", f"{script.live}/", f"{out}/") == ""
    assert script.seen() == before
    listed = {one["note"]: sorted(copy["node"] for copy in one["copies"]) for one in _rows(pair) if one["note"]}
    assert listed == {**{f"auto-{number}": ["a", "b"] for number in (1, 2, 3)}, "auto-4": ["a"], "auto-5": ["a"]}


def test_the_next_delta_starts_from_ours(pair: Cluster, script: Script) -> None:
    pair.ok("resync", VOLUME, timeout_s=200)
    zfsfs.zfs("snapshot", f"{script.here}@auto-6")
    before = script.seen()
    (script.live / "more").write_bytes(os.urandom(CHANGE_BYTES))
    (done,) = pair.ok("resync", VOLUME, timeout_s=200)["resyncs"]
    assert (done["state"], done["plan"]["base_name"], done["plan"]["target_cp"]) == ("SUCCEEDED", "1-1", "1-2")
    theirs = next(one["id"] for one in _rows(pair) if one["note"] == "auto-3")
    pair.refused("drop", theirs, "--node", "b", "--yes", reason="PINNED")
    assert script.seen() == before


def _rows(pair: Cluster) -> list[dict]:
    return list(pair.ok("snapshots", VOLUME)["snapshots"])
