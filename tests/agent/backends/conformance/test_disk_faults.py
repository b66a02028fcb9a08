"""The disk fails at every step of every operation, with EIO and with ENOSPC, once or for as long as the operation runs.

The calls that fail are real ones, and the kernel fails them (`tests/faults.py`). The operation ends with its reason and
never with anything else; the path shows one whole live copy; the same process goes on when the disk is well again, and
so does one that is started anew; nothing is lost, and nothing is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from resilver.volume import LiveState, VolumeRecord
from tests import faults
from tests.agent.backends.adapter import VOLUME_ID, Kind, Place, Replica
from tests.agent.backends.conformance.cases import SCENARIOS, Case
from tests.agent.backends.crash import At, Steps, deciding, whole
from tests.agent.backends.transfer import close_stages, open_stage
from tests.faults import Fault, Outcome, faulty

DISTINCT = True
BY_CALLS = True
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(faults.available()), reason=faults.available() or "-"),
]
REASONS = {"EIO": {"", "IO_ERROR"}, "ENOSPC": {"", "NO_SPACE"}}
THEN = pytest.mark.parametrize("then", ["same-process", "new-process"])


class Agent:
    """A running agent's replica: its steps go to whoever does the present work."""

    def __init__(self, target: Replica) -> None:
        self._step: faults.Step = lambda _name: None
        self.replica = target.again(step=self._at)

    def _at(self, name: str) -> None:
        self._step(name)

    def on_faulty_disk(self, work: Callable[[Replica], object], fault: Fault | None) -> Outcome:
        """Does some work while its disk fails; the agent lives on."""

        def steps(step: faults.Step) -> None:
            self._step = step
            work(self.replica)

        try:
            return faulty(steps, self.replica.directory, fault)
        finally:
            self._step = lambda _name: None
            close_stages()

    def clear(self) -> None:
        """What an agent does that has met a fault: the stage goes, and all else is as after a start."""
        self.replica.backend.discard_stage()
        self.replica.backend.recover()


def faults_at(steps: list[At]) -> Iterator[Fault]:
    """Each error at each step: of the next call alone, and of all from there on."""
    for at in steps:
        for error in REASONS:
            for lasting in (False, True):
                yield Fault(error, at.step, at.nth, lasting=lasting)


def steps_in(work: Callable[[Replica], object], target: Replica, prefix: str = "") -> list[At]:
    recorder = Steps()
    work(target.again(step=recorder))
    return [at for at in recorder.called if at.step.startswith(prefix)]


def check_reason(outcome: Outcome, fault: Fault) -> None:
    """A typed reason for what failed; done, where nothing failed or nothing hung on what did."""
    assert outcome.reason in REASONS[fault.error], f"{fault}: {outcome}"
    assert outcome.failed or not outcome.reason, f"{fault}: {outcome}"


# Committing.


@THEN
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_in_a_commit(place: Place, kind: Kind, scenario: str, then: str) -> None:
    first = Case(place, scenario, "first")
    steps = steps_in(first.commit_by, first.target, "commit.")
    assert steps
    hits = 0
    for number, fault in enumerate(faults_at(steps)):
        case = Case(place, scenario, f"vm{number}")
        agent = Agent(case.target)
        outcome = agent.on_faulty_disk(case.commit_by, fault)
        hits += bool(outcome.failed)
        shown = check_commit(case, agent, outcome, fault, then)
        decided = deciding(kind, "commit", steps)
        if outcome.reason and decided is not None:
            assert shown is (steps.index(At(fault.step, fault.nth)) >= decided), f"{fault}: {outcome}"
    assert hits > len(steps), "most of the faults met something"


def check_commit(case: Case, agent: Agent, outcome: Outcome, fault: Fault, then: str) -> bool:
    """What holds after a commit on a failing disk, whatever became of it. Whether the new state was there at once."""
    check_reason(outcome, fault)
    shown = case.check_one_whole()
    assert shown or outcome.reason, f"{fault}: done, and not there: {outcome}"
    if then == "new-process":
        assert case.recover() is shown or case.target.kind.may_be_absent, f"{fault}: {outcome}"
        agent = Agent(case.target)
    agent.clear()
    case.fill(agent.replica)
    case.commit_by(agent.replica)
    agent.replica.backend.discard_stage()
    case.check_done()
    return shown


@THEN
@pytest.mark.parametrize("error", REASONS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_of_every_call_of_a_commit(place: Place, kind: Kind, scenario: str, error: str, then: str) -> None:
    """Not at the steps only: the first call, the second, and so on, until there is none left to fail."""
    number = 0
    while True:
        fault = Fault(error, skip=number)
        case = Case(place, scenario, f"vm{number}")
        agent = Agent(case.target)
        outcome = agent.on_faulty_disk(case.commit_by, fault)
        check_commit(case, agent, outcome, fault, then)
        if not outcome.failed:
            break
        number += 1
    assert number > 20, "it takes more calls than that"


# Receiving.


@THEN
@pytest.mark.parametrize("error", REASONS)
@pytest.mark.parametrize("scenario", ["newcomer", "diverged"])
def test_a_fault_while_receiving(place: Place, kind: Kind, scenario: str, error: str, then: str) -> None:
    """Of some of the calls that make a stage and fill it: the target is as it was, and the next run brings it there."""
    case = Case(place, scenario)
    agent = Agent(case.target)
    agent.clear()
    calls = len(agent.on_faulty_disk(case.fill, None).calls)
    for number, skip in enumerate(range(0, calls, max(1, calls // 12))):
        agent.clear()
        fault = Fault(error, skip=skip, lasting=bool(number % 2))
        outcome = agent.on_faulty_disk(case.fill, fault)
        check_reason(outcome, fault)
        assert case.check_one_whole() is False
        if then == "new-process":
            assert case.recover() is False
            agent = Agent(case.target)
    agent.clear()
    assert case.target.debris() == []
    case.fill(agent.replica)
    case.commit_by(agent.replica)
    case.check_done()


def test_a_whole_stage_that_cannot_be_looked_at(place: Place, kind: Kind) -> None:
    """A run asks a stream's stage whether it is whole, from a thread of its own."""
    if kind.shape == "blocks":
        pytest.skip("blocks are counted by the journal")
    case = Case(place, "newcomer")
    stage = open_stage(case.target, case.source, case.base, case.goal.tip)
    reasons = []
    for skip in range(100):
        outcome = faulty(lambda _step: stage.complete, case.target.directory, Fault("EIO", skip=skip))
        if not outcome.failed:
            break
        reasons.append(outcome.reason)
        assert stage.complete
    assert set(reasons) == {"IO_ERROR"}


# Taking a snapshot.


@THEN
def test_a_fault_in_a_snapshot(replica: Replica, kind: Kind, then: str) -> None:
    replica.create()
    first = replica.snapshot()
    replica.edit(100)
    steps = steps_in(lambda each: each.snapshot(), replica)
    decided = deciding(kind, "snapshot", steps)
    for number, fault in enumerate(faults_at(steps)):
        replica.edit(number)
        live, before, agent = replica.contents(), replica.lineage, Agent(replica)
        outcome = agent.on_faulty_disk(lambda each: each.snapshot(), fault)
        check_reason(outcome, fault)
        assert replica.contents() == live
        seen = replica.again().lineage.tip_id != before.tip_id
        assert seen or outcome.reason, f"{fault}: done, and not there: {outcome}"
        if outcome.reason and decided is not None:
            assert seen is (steps.index(At(fault.step, fault.nth)) >= decided), f"{fault}: {outcome}"
        if then == "new-process":
            agent = Agent(replica)
        agent.clear()
        assert (agent.replica.lineage.tip_id != before.tip_id) is seen, "what was seen is what there is"
        if not seen:
            assert agent.replica.lineage == before
            assert agent.replica.state is LiveState.MODIFIED
            agent.replica.snapshot()
        whole(agent.replica)
        assert replica.contents(agent.replica.lineage.tip_id) == replica.contents() == live
    assert replica.lineage.find(first.id).present


# Letting go.


@THEN
def test_a_fault_in_a_prune(replica: Replica, kind: Kind, then: str) -> None:
    def prune(each: Replica) -> object:
        return each.backend.prune(1, frozenset())

    replica.create()
    for turn in range(3):
        replica.edit(turn)
        replica.snapshot()
    for fault in faults_at(steps_in(prune, replica)):
        while sum(record.present for record in replica.lineage) < 3:
            replica.edit(9)
            replica.snapshot()
        ids, live, agent = [record.id for record in replica.lineage], replica.contents(), Agent(replica)
        check_reason(agent.on_faulty_disk(prune, fault), fault)
        assert [record.id for record in replica.again().lineage] == ids
        if then == "new-process":
            agent = Agent(replica)
        agent.clear()
        whole(agent.replica)
        assert [record.id for record in agent.replica.lineage] == ids
        assert replica.contents() == replica.contents(ids[0]) == live
        prune(agent.replica)
        assert [record.present for record in agent.replica.lineage] == [True, *[False] * (len(ids) - 1)]
        whole(agent.replica)


@THEN
def test_a_fault_in_a_drop(place: Place, kind: Kind, then: str) -> None:
    """Of a preserved copy: it is there whole, or gone, and the others are untouched."""
    first = Case(place, "diverged", "first")
    first.commit()
    steps = steps_in(lambda each: each.backend.drop(first.target.preserved[0].id), first.target)
    for number, fault in enumerate(faults_at(steps)):
        case = Case(place, "diverged", f"vm{number}")
        copies = case.commit()
        gone, agent = copies[number % len(copies)], Agent(case.target)
        check_reason(agent.on_faulty_disk(lambda each, gone=gone: each.backend.drop(gone.id), fault), fault)
        if then == "new-process":
            agent = Agent(case.target)
        agent.clear()
        if gone in agent.replica.preserved:
            agent.replica.backend.drop(gone.id)
        del case.own["live" if gone.live else gone.based_on]
        case.check_done()
        whole(agent.replica)


# What the agent was told.


@THEN
@pytest.mark.parametrize("error", REASONS)
def test_a_fault_while_a_record_is_kept(replica: Replica, kind: Kind, error: str, then: str) -> None:
    """Of every call: the record that is read afterwards is the one before or the new one, and the next is kept."""
    records = [VolumeRecord("vm1", VOLUME_ID, epoch=number + 1, epoch_id=f"e{number}") for number in range(2)]
    replica.backend.save_record(records[0])
    number = 0
    while True:
        agent, fault = Agent(replica), Fault(error, skip=number)
        outcome = agent.on_faulty_disk(lambda each: each.backend.save_record(records[1]), fault)
        check_reason(outcome, fault)
        if then == "new-process":
            agent = Agent(replica)
            agent.replica.backend.recover()
        kept = agent.replica.backend.examine().record
        assert kept in records
        assert outcome.reason or kept == records[1], f"{fault}: done, and not there: {outcome}"
        if not outcome.failed:
            break
        agent.replica.backend.save_record(records[0])
        assert replica.again().backend.examine().record == records[0]
        number += 1
    assert number > 3, "it takes more calls than that"
