"""Three nodes are stopped and looked at offline: the comparison names the winner that the coordinator then names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB
from tests.cluster import Cluster
from tests.loopfs import needs_root

pytestmark = needs_root

IMAGE_BYTES = 32 * MIB
NODES = ("a", "b", "c")
WINNERS = {"stale": "a", "parted": "b"}
"""stale: a is the primary at 1-4, b behind at 1-2, c at 1-1. parted: the same, and b was elected while a was away."""


@dataclass(frozen=True)
class Looked:
    """A cluster whose agents are stopped, and what `inspect -o json` printed on each node."""

    cluster: Cluster
    files: dict[str, Path]

    def compare(self, volume: str, *nodes: str) -> tuple[int, Any]:
        """Exit code and election of the nodes named."""
        paths = [str(self.files[node]) for node in nodes]
        ran = self.cluster.cli("inspect", "--compare", *paths, "--volume", volume)
        return ran.code, ran.json

    def run_only(self, *nodes: str) -> None:
        """Those agents and no others."""
        for node in NODES:
            process = self.cluster.processes[node]
            if node not in nodes:
                process.stop()
            elif process.running is None:
                process.start()
        self.cluster.wait_reachable("stale", *nodes)


@pytest.fixture(scope="module")
def looked(trio: Cluster, disk: Path) -> Looked:
    places = {node: {volume: disk / node / f"{volume}.img" for volume in WINNERS} for node in NODES}
    for node in NODES:
        (disk / node).mkdir()
    for seed, volume in enumerate(WINNERS):
        images.make(places["a"][volume], IMAGE_BYTES, IMAGE_BYTES // 4, seed)
    for node in NODES:
        trio.start_agent(node, places[node])
    trio.wait_reachable("stale", *NODES)
    trio.ok("resync", "--all")
    trio.processes["c"].stop()
    _write(trio, 1)
    trio.ok("resync", "--all", "--to", "b")
    for seed in (2, 3):
        _write(trio, seed)
        trio.ok("snapshot", "--all")
    trio.processes["a"].stop()
    trio.wait_away("parted", "a")
    trio.ok("elect", "parted", "--accept-loss", "a")
    trio.processes["b"].stop()
    return Looked(trio, {node: _inspect(trio, disk, node) for node in NODES})


def _write(cluster: Cluster, seed: int) -> None:
    for volume in WINNERS:
        images.write(cluster.image("a", volume), images.scattered(IMAGE_BYTES, 20, seed), seed)


def _inspect(cluster: Cluster, disk: Path, node: str) -> Path:
    """By the agent's configuration, by the directory, by the images: each node by another way to say it."""
    words = {
        "a": [str(cluster.directory / "a.toml")],
        "b": [str(disk / "b"), "--node", "b"],
        "c": [*(str(cluster.image("c", volume)) for volume in WINNERS), "--node", "c"],
    }
    ran = cluster.cli("inspect", *words[node])
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["replicas"]
    assert sorted((one["node"], one["volume"]) for one in found) == sorted((node, volume) for volume in WINNERS)
    path = cluster.directory / f"{node}.json"
    path.write_text(ran.out)
    return path


def _decision(election: Any) -> dict[str, Any]:
    """What an election says, without its times and names of its own."""
    said = {key: election[key] for key in ("winner", "epoch", "previous_primary", "cp", "rule")}
    said["candidates"] = {one["node"]: (one["cp"], one["snapshot"], one["state"]) for one in election["candidates"]}
    return said


def test_the_comparison_names_the_winner_that_the_coordinator_names(looked: Looked) -> None:
    offline = {}
    for volume, winner in WINNERS.items():
        code, offline[volume] = looked.compare(volume, *NODES)
        assert (code, offline[volume]["winner"]) == (0, winner)
    looked.run_only(*NODES)
    for volume, winner in WINNERS.items():
        elected = looked.cluster.ok("elect", volume)
        assert _decision(elected) == _decision(offline[volume])
        assert looked.cluster.volume(volume)["primary"] == winner


def test_without_the_primary_both_refuse_alike(looked: Looked) -> None:
    code, offline = looked.compare("stale", "b", "c")
    assert code == 3
    looked.run_only("b", "c")
    looked.cluster.wait_away("stale", "a")
    asked = looked.cluster.refused("elect", "stale", "--dry-run", reason="PRIMARY_AWAY").json
    for election in (offline, asked):
        refusal = election["refusal"]
        assert (election["winner"], refusal["reasons"]) == (None, ["PRIMARY_AWAY", "NEWEST_COPY_MISSING"])
        assert [loss["node"] for loss in refusal["losses"]] == ["a"]
        assert refusal["next_command"] == "resilver elect stale --accept-loss a"
    # The other volume has a primary since, and does not miss a.
    code, offline = looked.compare("parted", "b", "c")
    assert (code, offline["winner"]) == (0, "b")
    assert looked.cluster.ok("elect", "parted")["winner"] == "b"
