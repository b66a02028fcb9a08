"""Two agents on one snapshot directory: the second is refused as long as the first one lives, and says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.backends.base import CommitOrder
from agent.disk.durable import read_json, write_json
from agent.identity import Identity
from resilver.errors import Damaged, Refused
from resilver.volume import Grant, VolumeRecord
from tests.agent.backends.replica import SIZE, VOLUME_ID, Replica


@pytest.fixture(params=["xfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Identity]]:
    """Starts an agent, as far as its state_dir is concerned; all are ended with the test."""
    made: list[Identity] = []

    def start(node: str) -> Identity:
        made.append(Identity(tmp_path / node, "test", node))
        return made[-1]

    yield start
    for each in made:
        each.close()


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(Refused) as raised:
        work()
    assert raised.value.reason == "IN_USE"
    assert "snapshot_dir of its own" in raised.value.message
    return raised.value.message


def test_a_second_agent_is_refused_whatever_it_would_change(place: Path, started: Callable[[str], Identity]) -> None:
    first, second = started("a"), started("b")
    mine = Replica(place / "x", state_dir=first.state_dir)
    theirs = Replica(place / "x", state_dir=second.state_dir)
    mine.create()
    taken = [mine.snapshot().id for _ in range(2)]
    assert mine.root / "agent.json" in mine.root.iterdir()
    stage = mine.open_stage(taken[1], "s", SIZE)
    backend = theirs.backend
    grant = Grant(VOLUME_ID, 1, "e")
    for work in (
        backend.recover,
        lambda: backend.save_record(VolumeRecord("vm1")),
        lambda: backend.save_grant(grant),
        lambda: backend.save_grant(None),
        theirs.snapshot,
        lambda: backend.open_stage("", "t", SIZE),
        backend.discard_stage,
        lambda: backend.commit(stage, CommitOrder("r", VOLUME_ID, mine.lineage, taken[1])),
        lambda: backend.drop(taken[0]),
        lambda: backend.prune(1, frozenset()),
        lambda: backend.compact(lambda: False),
    ):
        before = mine.traces()
        assert f"pid {os.getpid()}, whose state_dir is {first.state_dir}" in refused(work)
        assert mine.traces() == before
    assert backend.examine().lineage == mine.lineage, "looking is free"
    stage.close()
    mine.backend.recover()
    mine.snapshot()
    # The first one ends, and is started again after the second.
    first.close()
    backend.recover()
    theirs.snapshot()
    again = Replica(place / "x", state_dir=started("a").state_dir)
    assert str(second.state_dir) in refused(again.backend.recover)
    second.close()
    again.backend.recover()
    again.snapshot()
    assert len(again.lineage) == 5


def test_nothing_is_kept_open_between_two_changes(place: Path, started: Callable[[str], Identity]) -> None:
    """A disk can be unmounted while its agent lives."""
    mine = Replica(place / "x", state_dir=started("a").state_dir)
    mine.create()
    mine.backend.recover()
    first = mine.snapshot()
    mine.snapshot()
    mine.backend.drop(first.id)
    mine.backend.prune(1, frozenset())
    opened = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert [each for each in opened if each.startswith(str(place))] == []


def test_a_copy_of_the_directory_is_another_one(place: Path, started: Callable[[str], Identity]) -> None:
    mine = Replica(place / "x", state_dir=started("a").state_dir)
    mine.create()
    mine.snapshot()
    shutil.copytree(place / "x", place / "y")
    theirs = Replica(place / "y", state_dir=started("b").state_dir)
    theirs.backend.recover()
    theirs.snapshot()
    mine.snapshot()


@pytest.mark.parametrize("said", [{}, {"state_dir": 5}, {"state_dir": "/no\0where"}, {"state_dir": "/proc/self"}, None])
def test_what_names_no_living_agent_is_written_anew(
    place: Path, started: Callable[[str], Identity], said: dict[str, Any] | None
) -> None:
    mine = Replica(place / "x", state_dir=started("a").state_dir)
    mine.create()
    mine.backend.save_record(VolumeRecord("vm1"))
    path = mine.root / "agent.json"
    right = read_json(path)
    assert right is not None
    if said is None:
        path.write_text(json.dumps(right))
    else:
        write_json(path, {**right, "lock": "1-1", **said})
    mine.snapshot()
    assert read_json(path) == right


def test_one_whose_state_dir_cannot_be_seen_is_met_by_the_lock(place: Path, started: Callable[[str], Identity]) -> None:
    met = []
    theirs = Replica(place / "x")

    def step(name: str) -> None:
        if name == "snapshot.cloned":
            met.append(refused(theirs.backend.recover))

    mine = Replica(place / "x", state_dir=started("a").state_dir, step=step)
    mine.create()
    mine.backend.save_record(VolumeRecord("vm1"))
    taken = mine.snapshot()
    assert "another agent at this moment" in met[0]
    theirs.backend.recover()
    assert mine.lineage.tip == taken


def test_a_full_disk_does_not_keep_an_agent_from_its_work(place: Path, started: Callable[[str], Identity]) -> None:
    """What says whose the directory is cannot be written: tried again with the next change."""
    mine = Replica(place / "x", state_dir=started("a").state_dir)
    mine.create()
    mine.backend.save_record(VolumeRecord("vm1"))
    path = mine.root / "agent.json"
    path.unlink()
    (mine.root / ".agent.json.tmp").mkdir()
    mine.snapshot()
    assert not path.exists()
    (mine.root / ".agent.json.tmp").rmdir()
    mine.backend.recover()
    assert path.exists()


def test_nothing_is_written_through_a_link(place: Path, started: Callable[[str], Identity]) -> None:
    mine = Replica(place / "x", state_dir=started("a").state_dir)
    mine.create()
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    mine.root.parent.mkdir()
    mine.root.symlink_to(elsewhere)
    with pytest.raises(Damaged, match="symbolic link"):
        mine.backend.recover()
    assert list(elsewhere.iterdir()) == []
