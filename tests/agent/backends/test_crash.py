"""Killed, or out of space, at every named step: the path shows one whole image, and the next start makes all whole.

A forked child does the work and kills itself at a step. What it left is looked at before anything is recovered.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.backends import image_commit, image_snapshot
from agent.backends.image import STEPS
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.replica import SIZE, Replica, noise


@pytest.fixture(params=["xfs", "btrfs", "ext4"])
def kind(request: pytest.FixtureRequest) -> str:
    """Compression makes no difference to what a crash leaves."""
    return request.param


def killed(work: Callable[[Callable[[str], None]], None], at: str) -> bool:
    """Runs the work in a child that SIGKILLs itself at a step; whether it came that far."""
    pid = os.fork()
    if pid == 0:
        try:

            def step(name: str) -> None:
                if name == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            work(step)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def whole(replica: Replica) -> None:
    """The record, the snapshots and the live copy agree, and nothing is left over."""
    found = replica.backend.examine()
    assert found.live.state is LiveState.UNMODIFIED
    debris = (".new", ".keep", ".trash", ".live")
    assert not [entry for entry in replica.root.iterdir() if entry.name.startswith(debris)]
    assert not (replica.root / "commit.json").exists()
    for record in found.lineage:
        assert record.present == replica.data(record.id).exists()


# Taking a snapshot.


@pytest.mark.parametrize("step", image_snapshot.STEPS)
def test_killed_in_a_snapshot(replica, step):
    replica.create()
    first = replica.snapshot()
    replica.write(0, noise(3, 9000))
    live = replica.content
    assert killed(lambda at: Replica(replica.directory, step=at).snapshot(), step)
    assert replica.content == live
    came = replica.lineage.tip_id != first.id
    assert came is (step in {"snapshot.renamed", "snapshot.synced"})
    again = Replica(replica.directory)
    again.backend.recover()
    assert (again.lineage.tip_id != first.id) is came
    if not came:
        assert again.backend.examine().live.state is LiveState.MODIFIED
        again.snapshot()
    whole(again)
    assert again.data(again.lineage.tip_id).read_bytes() == live


# Committing.


class Case:
    """A source and a target with a filled stage, and what the target shows before and after."""

    def __init__(self, place: Path, scenario: str) -> None:
        self.source, self.target = Replica(place / "a"), Replica(place / "b")
        self.source.create()
        base = self.source.snapshot().id
        self.own: dict[str, bytes] = {}
        if scenario == "newcomer":
            base = ""
        else:
            self.target.receive(self.source)
        if scenario == "diverged":
            for turn in range(2):
                self.target.write(turn * 100_000, noise(turn, 5000))
                self.own[self.target.snapshot().id] = self.target.content
            self.target.write(300_000, b"live")
            self.own["live"] = self.target.content
        self.source.write(500_000, noise(50, 50_000))
        self.source.resize(SIZE + 8192)
        self.goal = self.source.snapshot(epoch=2).id
        self.base = base
        self.before = self.target.lineage
        stage, _ = self.target.stage_from(self.source, base, self.source.lineage.tip)
        stage.close()
        self.old = self.target.content if self.target.path.exists() else None
        self.new = self.source.content

    def commit(self, step: Callable[[str], None] = lambda _name: None) -> None:
        replica = Replica(self.target.directory, step=step)
        stage = replica.backend.open_stage(self.base, self.goal, len(self.new))
        try:
            if replica.lineage.tip_id != self.goal:
                assert stage.resumed
            replica.backend.commit(
                stage, replica.order(self.source.lineage, expected_tip=self.before.tip_id, replace_own_data=True)
            )
        finally:
            stage.close()

    @property
    def shown(self) -> bytes | None:
        return self.target.path.read_bytes() if self.target.path.exists() else None

    def check_one_whole_image(self) -> bool:
        """Looks at what was left, unrecovered; whether it is the new image."""
        shown = self.shown
        assert shown in {self.old, self.new}
        tip = Replica(self.target.directory).lineage.tip_id
        assert tip == (self.goal if shown == self.new else self.before.tip_id)
        return shown == self.new

    def check_after(self, *, came: bool) -> None:
        """Recovers; the image is as it was found, the commit can be done or is done, and all own data is there."""
        again = Replica(self.target.directory)
        again.backend.recover()
        assert self.check_one_whole_image() is came
        if not came:
            assert again.backend.examine().preserved == ()
            assert again.lineage.ids() == self.before.ids()
        self.commit()
        if came:
            again.backend.discard_stage()
        assert self.shown == self.new
        whole(again)
        assert again.lineage.ids() == self.source.lineage.ids()
        kept = {("live" if copy.live else copy.based_on): Path(copy.path) for copy in again.backend.examine().preserved}
        assert {name: path.read_bytes() for name, path in kept.items()} == self.own


@pytest.mark.parametrize("scenario", ["stale", "diverged", "newcomer"])
def test_killed_in_a_commit(place, scenario):
    """Every step in one test, each from the state that the kill before has left undone, until it is done."""
    for number, step in enumerate(image_commit.STEPS):
        case = Case(fresh(place / f"{number}"), scenario)
        assert killed(case.commit, step), step
        came = case.check_one_whole_image()
        decided = image_commit.STEPS.index("commit.exchanged")
        assert came is (number >= decided), step
        case.check_after(came=came)


def fresh(path: Path) -> Path:
    path.mkdir()
    return path


def test_killed_again_while_recovering(place):
    """The finishing of an interrupted commit is itself interrupted, at each of its steps."""
    for number, step in enumerate(("commit.kept", "commit.live_kept", "commit.closed")):
        case = Case(fresh(place / f"{number}"), "diverged")
        assert killed(case.commit, "commit.synced")
        assert killed(lambda at, case=case: Replica(case.target.directory, step=at).backend.recover(), step)
        assert case.check_one_whole_image()
        case.check_after(came=True)


def test_killed_at_any_moment(place):
    """Not at a step: somewhere."""
    case = Case(fresh(place / "first"), "diverged")
    begun = time.monotonic()
    case.commit()
    took = time.monotonic() - begun
    chance = random.Random(5)
    for number in range(6):
        case = Case(fresh(place / f"{number}"), "diverged")
        pid = os.fork()
        if pid == 0:
            try:
                case.commit()
            finally:
                os._exit(0)
        time.sleep(chance.random() * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        case.check_after(came=case.check_one_whole_image())


def test_killed_in_a_prune(replica):
    replica.create()
    for turn in range(3):
        replica.write(0, noise(turn, 5000))
        replica.snapshot()
    for step in ("prune.logged", "prune.renamed", "prune.removed"):
        ids = replica.lineage.ids()
        if sum(record.present for record in replica.lineage) == 1:
            replica.write(0, noise(9, 5000))
            replica.snapshot()
            ids = replica.lineage.ids()
        assert killed(lambda at: Replica(replica.directory, step=at).backend.prune(1, frozenset()), step)
        assert replica.lineage.ids() == ids
        replica.backend.recover()
        whole(replica)
        assert replica.lineage.ids() == ids
    replica.backend.prune(1, frozenset())
    assert [record.present for record in replica.lineage][1:] == [False] * (len(replica.lineage) - 1)


def test_killed_in_a_drop(place):
    case = Case(place, "diverged")
    case.commit()
    copies = case.target.backend.examine().preserved
    assert killed(
        lambda at: Replica(case.target.directory, step=at).backend.drop(copies[0].id) and None, "drop.renamed"
    )
    case.target.backend.recover()
    assert case.target.backend.examine().preserved == copies[1:]
    whole(case.target)


# Out of space.


def fill(directory: Path) -> Path:
    """Takes all that is free on a file system."""
    path = directory / "filler"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    size, at = 1 << 30, 0
    while size >= 4096:
        try:
            os.posix_fallocate(fd, at, size)
            at += size
        except OSError:
            size //= 2
    os.close(fd)
    return path


def reason_of(work: Callable[[], object]) -> str:
    """The reason that some work was refused for, empty if it was done."""
    try:
        work()
    except ResilverError as error:
        return error.reason
    return ""


@pytest.mark.parametrize("scenario", ["stale", "diverged"])
def test_full_disk_in_a_commit(small, scenario):
    """The disk fills up at a step: refused, or done; never torn, and done once there is room."""
    for number, step in enumerate(image_commit.STEPS):
        case = Case(fresh(small / f"{number}"), scenario)

        def filling(name: str, at: str = step) -> None:
            if name == at:
                fill(small)

        assert reason_of(lambda case=case, filling=filling: case.commit(filling)) in {"", "NO_SPACE", "IO_ERROR"}
        came = case.check_one_whole_image()
        (small / "filler").unlink()
        case.check_after(came=came)


def test_full_disk_in_a_snapshot(small):
    replica = Replica(fresh(small / "a"))
    replica.create()
    replica.snapshot()
    for step in image_snapshot.STEPS:
        replica.write(0, noise(3, 9000))
        before = replica.lineage

        def filling(name: str, at: str = step) -> None:
            if name == at:
                fill(small)

        reason = reason_of(Replica(replica.directory, step=filling).snapshot)
        assert reason in {"", "NO_SPACE", "IO_ERROR"}
        assert (replica.lineage == before) is bool(reason)
        (small / "filler").unlink()
        replica.backend.recover()
        if replica.lineage == before:
            replica.snapshot()
        whole(replica)


def test_every_step_is_named() -> None:
    assert len(set(STEPS)) == len(STEPS)
