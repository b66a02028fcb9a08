"""The offline comparison: the same winner as a coordinator names, from files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.compare import main, view_of
from coordinator.core.cluster import VolumeView
from coordinator.core.election import elect
from resilver.inspection import Inspection, dump
from tests.coordinator.core.histories import NOW_MS, view
from tests.coordinator.core.outages import Cluster
from tests.coordinator.core.test_election_laws import live


def files(seen: VolumeView, directory: Path) -> list[str]:
    """What `inspect` would have printed on each node that can be looked at."""
    made = []
    for node, replica in seen.replicas.items():
        if replica.fresh:
            path = directory / f"{node}.json"
            path.write_text(dump([Inspection(node, "vm1", NOW_MS, replica.report)]))
            made.append(str(path))
    return made


def test_a_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = view("a: 1 2 | b: 1 2 | c: 1")
    assert main(files(seen, tmp_path)) == 0
    said = capsys.readouterr()
    assert said.out.startswith("vm1: a would be primary, as before; epoch 1, from 1-2; rule: the primary is here")
    assert "is contained in a" in said.out
    assert not said.err


def test_a_winner_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files(view("a: 1 2 | b: 1 2 3", primary=""), tmp_path), "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["winner"], found["cp"], found["refusal"]) == ("b", "1-3", None)
    assert {one["node"]: one["verdict"] for one in found["candidates"]} == {"a": "is contained in b", "b": "won"}


def test_a_refusal_names_its_reason_first_and_then_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = files(view("a: away 1 2 3 | b: 1 2 | c: 1"), tmp_path)
    assert len(paths) == 2
    assert main(paths) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("PRIMARY_AWAY: the primary a does not answer; nothing has been heard of it")
    assert second == "next: resilver elect vm1 --accept-loss a"
    assert main([*paths, "-o", "json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["winner"], found["refusal"]["reasons"]) == (None, ["PRIMARY_AWAY", "NEWEST_COPY_MISSING"])


def test_a_replica_that_cannot_be_read_counts_as_away(tmp_path: Path) -> None:
    paths = files(view("a: 1 2 | b: 1 2", primary=""), tmp_path)
    (tmp_path / "c.json").write_text(dump([Inspection("c", "vm1", NOW_MS, None, "IO_ERROR", "no")]))
    assert main([*paths, str(tmp_path / "c.json")]) == 3


class TestFilesThatCannotBeUsed:
    @pytest.mark.parametrize("content", ["", "{}", "no json", '{"format": 9, "replicas": []}'])
    def test_name_themselves(self, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bad = tmp_path / "bad.json"
        bad.write_text(content)
        assert main([str(bad)]) == 2
        assert f"INVALID_FIELD: {bad} cannot be used: " in capsys.readouterr().err

    def test_are_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(tmp_path / "x.json")]) == 2
        assert "No such file" in capsys.readouterr().err

    def test_of_one_node_twice(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = files(view("a: 1", primary=""), tmp_path)
        assert main(paths * 2) == 2
        assert "--node" in capsys.readouterr().err

    def test_of_several_volumes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = view("a: 1", primary="").replicas["a"].report
        path = tmp_path / "two.json"
        path.write_text(dump([Inspection("a", name, NOW_MS, report) for name in ("vm1", "vm2")]))
        assert main([str(path)]) == 2
        assert "vm1, vm2: say with --volume" in capsys.readouterr().err
        assert main([str(path), "--volume", "vm1"]) == 0
        assert main([str(path), "--volume", "vm3"]) == 2

    def test_with_nothing_in_them(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "none.json"
        path.write_text(dump([]))
        assert main([str(path)]) == 2
        assert "hold no replica" in capsys.readouterr().err


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(5, 60))
def test_the_coordinator_that_has_lost_nothing_names_the_same_winner(chance: object, steps: int) -> None:
    """A cluster goes through anything; then everybody is heard, and told what the store knows."""
    cluster = Cluster()
    for _ in range(steps):
        live(cluster, chance)  # type: ignore[arg-type]  # hypothesis types its Random loosely
    for _ in range(2):
        for node in cluster.disks:
            cluster.start(node)
    seen = cluster.view()
    if seen.entry is None or seen.entry.recovering:
        return
    theirs = elect(seen, now_ms=NOW_MS)
    looked = [Inspection(node, "vm1", NOW_MS, one.report) for node, one in seen.replicas.items()]
    mine = elect(view_of(looked, "vm1"), now_ms=NOW_MS)
    assert type(mine) is type(theirs)
    assert getattr(mine, "winner", "") == getattr(theirs, "winner", "")
