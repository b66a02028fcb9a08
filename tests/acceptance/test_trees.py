"""A volume of files on each kind of volume: stale, diverged, killed in the middle, brought back.

What a replica holds is exported by the command and compared with the primary by rsync; the primary's files are a source
tree, small ones, holes, links, attributes, and a PostgreSQL that goes on to work on what was resynced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import postgres
from tests.acceptance import trees
from tests.acceptance.grounds import Ground, ground
from tests.acceptance.trees import MIB, differences
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import needs_root

pytestmark = [needs_root, postgres.needs_postgres, pytest.mark.timeout(400)]

NODES = ("a", "b", "c")
VOLUME = "files"


@dataclass
class Field:
    """A cluster whose volume is the same on three nodes; `kept` are copies of what `a` had, by name."""

    cluster: Cluster
    ground: Ground
    features: set[str]
    exports: int = 0
    kept: dict[str, Path] = field(default_factory=dict)

    def exported(self, node: str, snapshot: str, *, writable: bool = False) -> Path:
        self.exports += 1
        path = self.ground.outside(node, f"out-{self.exports}")
        words = ["--writable"] if writable else []
        answer = self.cluster.ok(
            "export", snapshot, "--node", node, "--to", str(path), "--timeout", "250", *words, timeout_s=300
        )
        assert answer["path"] == str(path)
        return self.ground.view(path, writable=writable)

    def tip(self, node: str) -> str:
        return str(self.cluster.replicas(VOLUME)[node]["snapshot"])

    def same_as(self, live: Path, *nodes: str) -> None:
        """Every node is in sync, and what its tip holds is what the live copy given holds."""
        for node in nodes:
            self.cluster.wait_state(VOLUME, node, "IN_SYNC")
            assert differences(live, self.exported(node, self.tip(node))) == "", node

    def resync(self, *words: str) -> dict[str, Any]:
        runs = self.cluster.ok("resync", VOLUME, *words, timeout_s=200)["resyncs"]
        for run in runs:
            assert run["state"] == "SUCCEEDED", run
            assert run["done_bytes"] == run["total_bytes"]
        return {run["node"]: run for run in runs}


@pytest.fixture(scope="module", params=["btrfs", "image", "zfs"])
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with begun(request.param, tmp_path_factory.mktemp("trees")) as made:
        yield made


@contextlib.contextmanager
def begun(backend: str, directory: Path, extra: str = "") -> Iterator[Field]:
    """A source tree and a database on `a`, and three nodes that report; `extra` is for the coordinator."""
    with ground(backend) as place, cluster(directory, "sqlite") as made:
        made.start_coordinator(extra=extra)
        live = place.create("a")
        features = trees.make(live, small_files=place.small_files)
        postgres.initialise(live / "pg")
        with postgres.running(live / "pg") as server:
            server.fill()
        for node in NODES:
            more = place.config(node)
            made.start_agent(node, {VOLUME: place.volume(node)}, volume_extra=more, backend=place.backend)
        made.wait_reachable(VOLUME, *NODES)
        yield Field(made, place, features)


def test_a_first_copy(there: Field) -> None:
    runs = there.resync()
    assert set(runs) == {"b", "c"}
    assert {run["plan"]["action"] for run in runs.values()} == {"FULL"}
    there.same_as(there.ground.live("a"), *NODES)
    assert there.features == there.ground.features


def test_a_node_that_missed_three_points_gets_what_changed_and_no_more(there: Field) -> None:
    made, live = there.cluster, there.ground.live("a")
    made.processes["c"].stop()
    for seed in (2, 3):
        trees.change(live, seed)
        made.ok("snapshot", VOLUME)
    with postgres.running(live / "pg") as server:
        server.work(200)
        made.ok("snapshot", VOLUME)
    made.restart("c")
    behind = made.wait_state(VOLUME, "c", "STALE")
    assert (behind["cp"], behind["behind_cps"]) == ("1-1", 3)

    (plan,) = made.ok("plan", VOLUME, "--snapshot")["volumes"]
    row = next(one for one in plan["replicas"] if one["node"] == "c")
    assert (row["action"], row["base_cp"]) == ("DELTA", "1-1")
    run = there.resync()["c"]
    assert run["resent_bytes"] == 0
    own = there.ground.own_send_bytes(made, "a", row["base"], run["plan"]["target"])
    assert run["wire_bytes"] <= 1.02 * own
    there.same_as(live, *NODES)
    if there.ground.still:
        assert there.resync() == {}


def test_a_database_that_was_running_works_on_from_any_point(there: Field) -> None:
    """The snapshot of a running server is as after a power cut: it recovers, and every transaction is whole."""
    live = there.ground.live("a")
    with postgres.running(live / "pg") as server:
        server.work(100)
        target = there.resync()["b"]["plan"]["target"]
        server.work(100)
    out = there.exported("b", target, writable=True)
    with postgres.running(out / "pg") as server:
        assert server.balanced()
        server.check()


def test_a_receiver_that_is_killed_goes_on_where_it_was(there: Field) -> None:
    made, live = there.cluster, there.ground.live("a")
    (live / "large").write_bytes(os.urandom(160 * MIB))
    (started,) = made.ok("resync", VOLUME, "--to", "b", "--no-wait")["resyncs"]
    wait_for(lambda: there.ground.received_bytes(made, "b") >= 16 * MIB, "a part is there", every_s=0.005)
    made.processes["b"].kill()
    made.restart("b")
    wait_for(lambda: _run(made, started["id"])["end_time"], "it ends", 120.0)
    run = _run(made, started["id"])
    assert run["state"] == "SUCCEEDED", run
    again = there.ground.again_bytes_max
    assert run["resent_bytes"] <= again
    assert run["wire_bytes"] <= 1.02 * run["done_bytes"] + again
    there.same_as(live, "b")


def test_a_primary_that_is_away_is_given_up_by_name_and_kept_when_it_comes_back(there: Field) -> None:
    made, live = there.cluster, there.ground.live("a")
    there.resync()
    trees.change(live, 5)
    (own,) = made.ok("snapshot", VOLUME)["snapshots"]
    there.kept["own"] = there.exported("a", own["id"])
    trees.change(live, 6)
    there.kept["live"] = there.ground.leave("a", "kept-live")
    made.processes["a"].stop()
    made.wait_away(VOLUME, "a")
    made.refused("resync", VOLUME, reason="PRIMARY_AWAY")
    made.refused("elect", VOLUME, "--accept-loss", "b", reason="PRIMARY_AWAY")
    elected = made.ok("elect", VOLUME, "--accept-loss", "a")
    assert (elected["winner"], elected["epoch"]) == ("b", 2)
    working = there.ground.writable("b")
    with postgres.running(working / "pg") as server:
        server.check()
        server.work(100)
    trees.change(working, 7)

    made.restart("a")
    made.wait_state(VOLUME, "a", "DIVERGED")
    runs = there.resync()
    assert set(runs) == {"a", "c"}
    assert {run["plan"]["action"] for run in runs.values()} == {"DELTA"}
    there.same_as(working, *NODES)
    copies = made.ok("preserved", VOLUME)["preserved"]
    assert {copy["id"] for copy in copies} == set(runs["a"]["preserved"])
    named = {"live" if copy["live"] else "own": copy["id"] for copy in copies}
    assert set(named) == {"live", "own"}
    for name, copy in named.items():
        assert differences(there.kept[name], there.exported("a", copy)) == "", name


def _run(made: Cluster, resync: str) -> Any:
    return next(run for run in made.resyncs(VOLUME) if run["id"] == resync)
