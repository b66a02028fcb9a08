"""Killed at every step, with SIGKILL: the old replica or the new one is there, and nothing of anybody's is lost."""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest

from agent.backends import zfs_commit
from agent.backends.zfs import STEPS
from resilver.errors import ResilverError
from resilver.volume import LiveState
from tests.agent.backends.zfs.replica import Replica, equal
from tests.zfsfs import zfs

Step = Callable[[str], None]
SNAPSHOT = [step for step in STEPS if step.startswith("snapshot.")]


def killed(work: Callable[[Step], object], at: str) -> bool:
    """Runs the work in a child that SIGKILLs itself at a step; whether it came that far. What fails before is told."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:

            def step(name: str) -> None:
                if name == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            work(step)
            code = 0
        except Exception:  # noqa: BLE001 - told, and the child ends
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"failed before {at}"
    return os.WIFSIGNALED(status)


def whole(replica: Replica) -> None:
    """The records and the snapshots agree, and nothing is left over."""
    found = replica.backend.examine()
    assert found.problems == ()
    assert not (replica.root / "commit.json").exists()
    assert not (replica.root / "stage").exists()
    names = replica.traces()
    assert not [name for name in names if "resilver-look" in name or "incoming" in name or name.endswith("/stage")]
    kept = {name for name in names if "/kept-" in name and "@" not in name}
    assert kept == {copy.path.partition("@")[0] for copy in found.preserved}


@pytest.mark.parametrize("step", SNAPSHOT)
def test_killed_in_a_snapshot(replica, step):
    replica.create()
    first = replica.snapshot()
    replica.write(3)
    assert killed(lambda at: replica.again(step=at).snapshot(), step)
    came = replica.again().lineage.tip_id != first.id
    assert came is (SNAPSHOT.index(step) >= SNAPSHOT.index("snapshot.recorded"))
    again = replica.again()
    again.backend.recover()
    assert (again.lineage.tip_id != first.id) is came
    if not came:
        assert again.state is LiveState.MODIFIED
        again.snapshot()
    assert again.state is LiveState.UNMODIFIED
    whole(again)
    holds = zfs("list", "-H", "-r", "-t", "snapshot", "-o", "userrefs", again.dataset).split()
    assert holds == ["1", "1"]


SEEDS = itertools.count(1)


class Case:
    """A source and a target with a whole stage."""

    def __init__(self, source: Replica, target: Replica, scenario: str) -> None:
        self.source, self.target, self.scenario = source, target, scenario
        if not source.lineage.records:
            source.create()
            source.snapshot()
        base = source.tip.id
        if scenario == "first":
            base = ""
        else:
            if target.lineage.tip_id != base:
                target.receive(source, target.lineage.tip_id, replace_own_data=True)
            if scenario == "diverged":
                target.write(next(SEEDS))
                target.snapshot()
            if scenario in {"diverged", "written"}:
                target.write(next(SEEDS))
        self.base = base
        source.write(next(SEEDS))
        self.goal = source.snapshot(epoch=2).id
        self.before = target.lineage
        self.preserved = target.backend.examine().preserved
        target.fill(source, base, self.goal).close()

    def commit(self, step: Step = lambda _name: None) -> None:
        replica = self.target.again(step=step)
        replica.backend.recover()
        if replica.lineage.tip_id == self.goal:
            return
        stage = replica.open_stage(self.source, self.base, self.goal)
        try:
            assert stage.resumed
            stage.finish()
            order = replica.order(self.source.lineage, expected_tip=self.before.tip_id, replace_own_data=True)
            replica.backend.commit(stage, order)
        finally:
            stage.close()

    def check(self) -> None:
        again = self.target.again()
        again.backend.recover()
        came = again.lineage.tip_id == self.goal
        if not came:
            assert again.lineage == self.before
            assert again.backend.examine().preserved == self.preserved
        self.commit()
        whole(again)
        assert equal(self.source, again)
        assert again.state is LiveState.UNMODIFIED
        assert again.lineage.ids() == self.source.lineage.ids()
        new = [copy for copy in again.backend.examine().preserved if copy not in self.preserved]
        assert len(new) == {"first": 0, "stale": 0, "written": 1, "diverged": 2}[self.scenario]


def steps_of(scenario: str) -> Iterator[str]:
    skipped = {
        "first": {"described", "compared", "received", "verified"},
        "stale": {"described", "promoted", "moved", "placed"},
    }.get(scenario, {"received", "verified"})
    yield from (step for step in zfs_commit.STEPS if step.removeprefix("commit.") not in skipped)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", ["stale", "diverged", "written"])
def test_killed_in_a_commit(node, scenario):
    """Every step on one pair of replicas, each time from where the one before has led."""
    source, target = node(), node()
    for step in steps_of(scenario):
        case = Case(source, target, scenario)
        assert killed(case.commit, step), step
        case.check()


@pytest.mark.timeout(600)
def test_killed_in_a_first_copy(node):
    source = node()
    for step in steps_of("first"):
        case = Case(source, node(), "first")
        assert killed(case.commit, step), step
        case.check()


def test_killed_again_while_recovering(node):
    source, target = node(), node()
    case = Case(source, target, "diverged")
    assert killed(case.commit, "commit.moved")
    for step in ("commit.promoted", "commit.placed", "commit.set", "commit.pointed", "commit.kept"):
        assert killed(lambda at: target.again(step=at).backend.recover(), step)
    case.check()


def test_an_error_in_the_middle_is_undone_or_finished(node):
    """In a running agent: the pool says no at a step, and the next order finds all as it was, or done."""
    source, target = node(), node()
    for step in ("commit.intended", "commit.received", "commit.verified", "commit.recorded", "commit.set"):
        case = Case(source, target, "stale")

        def failing(name: str, at: str = step) -> None:
            if name == at:
                raise OSError(5, "Input/output error")

        with pytest.raises(ResilverError):
            case.commit(failing)
        case.check()


def test_killed_in_a_drop(node):
    replica = node()
    replica.create()
    taken = []
    for turn in range(3):
        replica.write(turn)
        taken.append(replica.snapshot())
    for step in ("drop.logged", "drop.destroyed"):
        ids = replica.lineage.ids()
        assert killed(lambda at: replica.again(step=at).backend.drop(taken[0].id), step)
        replica.backend.recover()
        assert replica.lineage.ids() == ids
        whole(replica)
    assert [record.present for record in replica.lineage] == [True, True, False]


def test_every_step_is_named():
    assert len(set(STEPS)) == len(STEPS)
