"""A pair that a script has made with plain `btrfs send` and `btrfs receive`: five snapshots here, three of them there.

The first resync starts from the newest in common; what the script has made stays exactly what it was.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted, needs_root, run

pytestmark = [needs_root, pytest.mark.timeout(600)]

VOLUME = "home"
WHOLE_BYTES = 24 << 20
CHANGE_BYTES = 300_000


class Script:
    """What ran from cron until now: `home.N` beside the subvolume, and the same names on the backup."""

    def __init__(self, first: Path, backup: Path) -> None:
        self.live, self.here, self.there = first / VOLUME, first / "snaps", backup / "received"
        run("btrfs", "subvolume", "create", self.live)
        self.here.mkdir()
        self.there.mkdir()
        (self.live / "whole").write_bytes(os.urandom(WHOLE_BYTES))

    def snapshot(self, number: int) -> Path:
        (self.live / f"change {number}").write_bytes(os.urandom(CHANGE_BYTES))
        made = self.here / f"{VOLUME}.{number}"
        run("btrfs", "subvolume", "snapshot", "-r", self.live, made)
        return made

    def send(self, number: int) -> None:
        parent = ["-p", str(self.here / f"{VOLUME}.{number - 1}")] if number > 1 else []
        command = ["btrfs", "send", "-q", *parent, str(self.here / f"{VOLUME}.{number}")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as sending:
            subprocess.run(["btrfs", "receive", "-q", str(self.there)], stdin=sending.stdout, check=True, timeout=60)
        assert sending.returncode == 0

    def remove(self, snapshot: Path) -> None:
        run("btrfs", "subvolume", "delete", snapshot)

    def seen(self) -> dict[str, str]:
        """All that Btrfs says of each of its snapshots, on both sides, but what it notes when one is made from them."""
        told = {}
        for one in self._all():
            shown = run("btrfs", "subvolume", "show", one).partition("Snapshot(s)")[0]
            told[str(one)] = "".join(line for line in shown.splitlines() if "Generation:" not in line)
        return told

    def _all(self) -> list[Path]:
        return sorted([*self.here.iterdir(), *self.there.iterdir()])


@pytest.fixture(scope="module")
def disks() -> Iterator[tuple[Path, Path]]:
    with mounted("btrfs") as first, mounted("btrfs") as backup:
        yield first, backup


@pytest.fixture(scope="module")
def script(disks: tuple[Path, Path]) -> Script:
    """Five snapshots on the one side; the first three were sent, and each side has let one go since."""
    made = Script(*disks)
    for number in range(1, 6):
        made.snapshot(number)
        if number <= 3:
            made.send(number)
    made.remove(made.here / f"{VOLUME}.1")
    made.remove(made.there / f"{VOLUME}.2")
    (made.live / "since then").write_bytes(os.urandom(CHANGE_BYTES))
    return made


@pytest.fixture(scope="module")
def pair(script: Script, disks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), "sqlite") as made:
        made.start_coordinator()
        made.start_agent("a", {VOLUME: script.live}, backend="btrfs")
        adopt = f'adopt = ["{script.there}/{VOLUME}.*"]'
        made.start_agent("b", {VOLUME: disks[1] / VOLUME}, volume_extra=adopt, backend="btrfs")
        made.wait_reachable(VOLUME, "a", "b")
        yield made


def same_tree(left: Path, right: Path) -> None:
    """That both hold the same, by contents, owners, modes, ACLs, xattrs and hard links."""
    told = run("rsync", "-nacAXH", "--delete", "--itemize-changes", f"{left}/", f"{right}/")
    assert told == ""


def rows(pair: Cluster) -> dict[str, Any]:
    return {one["id"]: one for one in pair.ok("snapshots", VOLUME)["snapshots"]}


def test_a_pair_is_taken_over_by_a_delta_and_nothing_of_theirs_is_touched(pair: Cluster, script: Script) -> None:
    before = script.seen()
    (planned,) = pair.ok("plan", VOLUME)["volumes"]
    (row,) = planned["replicas"]
    assert (planned["primary"], planned["target_cp"], planned["takes_snapshot"]) == ("a", "1-1", True)
    assert (row["node"], row["state"], row["action"]) == ("b", "STALE", "DELTA")
    assert (row["base_cp"], row["base_name"], row["range_count"]) == (None, f"{VOLUME}.3", None)
    assert not (script.there.parent / VOLUME).exists(), "a plan moves nothing"
    assert script.seen() == before

    (done,) = pair.ok("resync", VOLUME)["resyncs"]
    assert (done["state"], done["action"], done["range_count"]) == ("SUCCEEDED", "DELTA", None)
    assert 2 * CHANGE_BYTES < done["done_bytes"] < WHOLE_BYTES / 4, "what came since home.3, and nothing else"
    pair.wait_state(VOLUME, "b", "IN_SYNC")
    same_tree(script.live, script.there.parent / VOLUME)
    assert script.seen() == before

    listed = rows(pair)
    names = {one["note"]: sorted(copy["node"] for copy in one["copies"]) for one in listed.values() if one["note"]}
    assert names == {"home.1": ["b"], "home.2": ["a"], "home.3": ["a", "b"], "home.4": ["a"], "home.5": ["a"]}
    beside = {one["note"] for one in listed.values() for copy in one["copies"] if copy["off_lineage"]}
    assert beside == {"home.1"}, "the primary does not know it any more"


def test_what_the_script_makes_later_lies_beside_and_the_next_delta_starts_from_ours(
    pair: Cluster, script: Script
) -> None:
    pair.ok("resync", VOLUME)
    script.snapshot(6)
    before = script.seen()

    def beside() -> bool:
        return any(
            copy["off_lineage"] for one in rows(pair).values() if one["note"] == "home.6" for copy in one["copies"]
        )

    wait_for(beside, "home.6 is seen beside the lineage")
    (done,) = pair.ok("resync", VOLUME)["resyncs"]
    assert (done["state"], done["plan"]["base_name"], done["plan"]["target_cp"]) == ("SUCCEEDED", "1-1", "1-2")
    same_tree(script.live, script.there.parent / VOLUME)
    assert script.seen() == before
    theirs = next(one["id"] for one in rows(pair).values() if one["note"] == "home.3")
    pair.refused("drop", theirs, "--node", "b", "--yes", reason="PINNED")
    pair.ok("prune", VOLUME, "--keep-last", "1")
    assert script.seen() == before
