"""One agent at a time: what a living one has is refused to another, which changes nothing of it by looking either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.identity import Identity
from resilver.errors import Refused
from resilver.volume import Grant, VolumeRecord
from tests.agent.backends.conformance.cases import Case
from tests.agent.backends.crash import Steps, deciding, killed
from tests.agent.backends.transfer import open_stage

DISTINCT = True


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[tuple[Identity, Identity]]:
    """Two that live, as far as their state_dirs are concerned."""
    first, second = Identity(tmp_path / "first", "test", "a"), Identity(tmp_path / "second", "test", "b")
    yield first, second
    first.close()
    second.close()


def refused(work: Callable[[], Any], by: Identity) -> None:
    with pytest.raises(Refused) as raised:
        work()
    assert raised.value.reason == "IN_USE"
    assert str(by.state_dir) in raised.value.message


def test_a_second_agent_is_refused_whatever_it_would_change(place, agents):
    first, second = agents
    case = Case(place, "diverged")
    mine, theirs = (case.target.again(state_dir=agent.state_dir) for agent in agents)
    mine.backend.recover()
    backend = theirs.backend
    stage = open_stage(mine, case.source, case.base, case.goal.tip)
    for work in (
        backend.recover,
        lambda: backend.save_record(VolumeRecord(mine.name)),
        lambda: backend.save_grant(Grant(mine.volume_id, 1, "e")),
        lambda: backend.save_grant(None),
        theirs.snapshot,
        lambda: open_stage(theirs, case.source, "", case.goal.tip),
        backend.discard_stage,
        lambda: backend.commit(stage, case.order(theirs)),
        lambda: backend.drop(case.base),
        lambda: backend.prune(1, frozenset()),
    ):
        before = mine.traces()
        refused(work, first)
        assert mine.traces() == before
    assert backend.examine().lineage == mine.lineage, "looking is free"
    mine.backend.commit(stage, case.order(mine))
    stage.close()
    case.check_done()
    first.close()
    backend.recover()
    theirs.snapshot()
    again = case.target.again(state_dir=first.state_dir)
    refused(again.backend.recover, second)


def test_what_one_has_begun_another_neither_finishes_nor_undoes(place, kind, agents):
    """Each is another moment of a commit: before it has decided, and after."""
    first, second = agents

    def commit(step: Any) -> None:
        case.commit_by(case.target.again(state_dir=first.state_dir, step=step))

    case = Case(place, "diverged", "probe")
    steps = Steps()
    commit(steps)
    taken = [at for at in steps.called if at.step.startswith("commit.")]
    at = deciding(kind, "commit", taken)
    decided = len(taken) // 2 if at is None else at
    for number, moment in enumerate((taken[decided - 1], taken[decided])):
        case = Case(place, "diverged", f"vm{number}")
        assert killed(commit, moment), moment
        before = case.target.traces()
        theirs = case.target.again(state_dir=second.state_dir)
        theirs.backend.examine()
        case.target.again(state_dir=first.state_dir).backend.examine()  # who looks at an agent's disks
        refused(theirs.backend.recover, first)
        refused(theirs.backend.discard_stage, first)
        assert case.target.traces() == before, moment
    first.close()
    theirs.backend.recover()
    case.commit_by(theirs)
    theirs.backend.discard_stage()
    case.check_done()
