"""Killed, or out of space, at every step of every operation: the path shows one whole live copy, the next start makes
all whole, nothing preserved or live is lost, and doing it again succeeds.

A forked child does the work and kills itself at a step. What it left is looked at before anything is recovered. Which
steps an operation takes is found by doing it once; at the end of the module, none that the backend has was left out.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from resilver.errors import ResilverError
from resilver.volume import LiveState, VolumeRecord
from tests.agent.backends.adapter import VOLUME_ID, Kind, Place
from tests.agent.backends.conformance.cases import SCENARIOS, Case
from tests.agent.backends.crash import At, Step, Steps, deciding, killed, reason_of, whole
from tests.agent.backends.transfer import close_stages, open_stage, transfer

DISTINCT = True
pytestmark = pytest.mark.timeout(3000)  # many replicas in one test, and of thin volumes each takes its time
EACH_ANEW = {"newcomer", "stale", "diverged"}  # the others differ in what is preserved: the same steps again
SEEN: dict[str, set[str]] = defaultdict(set)
FULL = {"", "NO_SPACE", "IO_ERROR"}


def steps_of(kind: Kind, work: Callable[[Step], object], prefix: str = "") -> list[At]:
    """Does the work once, and answers every step that it took, in order."""
    recorder = Steps()
    work(recorder)
    SEEN[kind.name] |= {at.step for at in recorder.called}
    return [at for at in recorder.called if at.step.startswith(prefix)]


# Taking a snapshot.


def test_killed_in_a_snapshot(replica, kind):
    replica.create()
    first = replica.snapshot()
    replica.edit(100)
    steps = steps_of(kind, lambda step: replica.again(step=step).snapshot())
    assert steps
    had_come = False
    for number, at in enumerate(steps):
        replica.edit(number)
        live, before = replica.contents(), replica.lineage
        assert killed(lambda step: replica.again(step=step).snapshot(), at), at
        assert replica.contents() == live
        again = replica.again()
        seen = again.lineage.tip_id != before.tip_id
        again.backend.recover()
        came = again.lineage.tip_id != before.tip_id
        assert came is seen, "what was seen before it recovered is what there is"
        assert came >= had_come, f"{at} comes after a step that had decided"
        decided = deciding(kind, "snapshot", steps)
        assert decided is None or came is (number >= decided), at
        had_come = came
        if not came:
            assert again.lineage == before
            assert again.state is LiveState.MODIFIED
            again.snapshot()
        whole(again)
        assert again.contents(again.lineage.tip_id) == again.contents() == live
    assert had_come
    assert replica.lineage.find(first.id).present


# The place for records.


def test_killed_while_a_place_is_made_ready(place, kind):
    """Whatever the first record needs is made with it: what a kill leaves of that stands in nobody's way."""
    record = VolumeRecord("vm1", VOLUME_ID)
    steps = steps_of(kind, lambda step: place.replica("a", "first", step=step).backend.save_record(record))
    replica = place.replica("a")
    for at in steps:
        assert killed(lambda step: replica.again(step=step).backend.save_record(record), at), at
        again = replica.again()
        again.backend.recover()
        assert again.backend.examine().record is None, at
    replica.again().backend.save_record(record)
    again = replica.again()
    again.backend.recover()
    assert again.backend.examine().record == record
    assert again.debris() == []


# Committing.


def each_anew(kind: Kind, scenario: str) -> bool:
    """Whether each kill has a replica of its own, and does not begin where the last one was recovered."""
    return scenario in EACH_ANEW and not kind.slow


def cases(place: Place, scenario: str, label: str, *, anew: bool = False) -> Iterator[Case]:
    """As many as are asked for; unless each is to be anew, one goes on until it is done."""
    number, case = 0, None
    while True:
        if case is None or anew or case.target.lineage.tip_id == case.goal.tip_id:
            close_stages()
            case = Case(place, scenario, f"{label}{number}")
            number += 1
        yield case


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_in_a_commit(place, kind, scenario):
    """At every step, each from the state that the kill before has left undone, until it is done."""
    steps = steps_of(kind, Case(place, scenario, "first").commit, "commit.")
    assert steps
    had_come = False
    anew = each_anew(kind, scenario)
    for at, case in zip(steps, cases(place, scenario, "vm", anew=anew), strict=False):
        assert killed(case.commit, at), at
        shown = case.check_one_whole()
        came = case.recover()
        assert came is shown or kind.may_be_absent, at
        assert came >= had_come, f"{at} comes after a step that had decided"
        decided = deciding(kind, "commit", steps)
        assert decided is None or came is (steps.index(at) >= decided), at
        had_come = came
        if came or anew:
            case.commit()
            if came:
                case.target.backend.discard_stage()
            case.check_done()
    assert had_come


def test_killed_again_while_recovering(place, kind):
    """Whatever a kill has left, the finishing or undoing of it is itself interrupted, at each of its steps."""
    steps = steps_of(kind, Case(place, "diverged", "first").commit, "commit.")
    decided = deciding(kind, "commit", steps)
    middle = len(steps) // 2 if decided is None else decided
    for number, at in enumerate(steps[max(0, middle - 1) : middle + 3]):
        case = Case(place, "diverged", f"vm{number}")
        assert killed(case.commit, at)
        probe = Case(place, "diverged", f"probe{number}")
        assert killed(probe.commit, at)
        for again in steps_of(kind, lambda step, probe=probe: probe.target.again(step=step).backend.recover()):
            # It may be done by now: a later recovery has less to do.
            killed(lambda step, case=case: case.target.again(step=step).backend.recover(), again)
            case.check_one_whole()
        case.recover()
        case.commit()
        case.target.backend.discard_stage()
        case.check_done()


@pytest.mark.parametrize("scenario", ["stale", "diverged"])
def test_an_error_at_a_step_is_undone_or_finished(place, kind, scenario):
    """Also where another program does the work: what comes next finds all as it was, or done."""
    steps = steps_of(kind, Case(place, scenario, "first").commit, "commit.")
    for at, case in zip(steps, cases(place, scenario, "vm"), strict=False):
        with pytest.raises(ResilverError) as failed:
            case.commit(Steps(at, failing))
        assert failed.value.reason == "IO_ERROR"
        case.recover()
        case.commit()
        case.target.backend.discard_stage()
        case.check_done()


def failing() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_killed_at_any_moment(place, kind):
    """Not at a step: somewhere."""
    first = Case(place, "diverged", "first")
    begun = time.monotonic()
    first.commit()
    took = time.monotonic() - begun
    chance = random.Random(5)
    for _turn, case in zip(range(6), cases(place, "diverged", "vm", anew=not kind.slow), strict=False):
        pid = os.fork()
        if pid == 0:
            try:
                case.commit()
            finally:
                os._exit(0)
        time.sleep(chance.random() * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        case.check_one_whole()
        if case.recover() or not kind.slow:
            case.commit()
            case.target.backend.discard_stage()
            case.check_done()


# Receiving.


def receiving(case: Case) -> Callable[[Step], None]:
    """The stage is made anew and filled; it calls a step of ours after each piece that came."""

    def work(step: Step) -> None:
        replica = case.target.again(step=step)
        stage = open_stage(replica, case.source, case.base, case.goal.tip)
        put = "write" if replica.kind.shape == "blocks" else "feed"
        real = getattr(stage, put)

        def piece(*given: object) -> None:
            real(*given)
            step("test.piece")

        setattr(stage, put, piece)
        transfer(case.source, replica, stage, frame_bytes=64 << 10)
        stage.close()

    return work


@pytest.mark.parametrize("scenario", ["newcomer", "stale", "diverged"])
def test_killed_in_the_middle_of_receiving(place, kind, scenario):
    """The live copy, the lineage and the preserved are as they were; the transfer, made again, ends as it should."""
    case = Case(place, scenario)
    case.target.backend.discard_stage()
    steps = steps_of(kind, receiving(case))
    case.target.backend.discard_stage()
    pieces = [at for at in steps if at.step == "test.piece"]
    assert pieces
    wanted = [at for at in steps if at.step != "test.piece"] + pieces[:: max(1, len(pieces) // 4)]
    for number, at in enumerate(wanted):
        assert killed(receiving(case), at), at
        assert case.check_one_whole() is False
        assert case.recover() is False
        if number % 2:
            case.target.again().backend.discard_stage()
            assert case.target.debris() == []
    case.fill()
    case.commit()
    case.check_done()


# Letting go.


def test_killed_in_a_prune(replica, kind):
    replica.create()
    for turn in range(3):
        replica.edit(turn)
        replica.snapshot()
    steps = steps_of(kind, lambda step: replica.again(step=step).backend.prune(1, frozenset()))
    for at in steps:
        while sum(record.present for record in replica.lineage) < 3:
            replica.edit(9)
            replica.snapshot()
        ids, live = [record.id for record in replica.lineage], replica.contents()
        assert killed(lambda step: replica.again(step=step).backend.prune(1, frozenset()), at), at
        assert [record.id for record in replica.lineage] == ids
        again = replica.again()
        again.backend.recover()
        whole(again)
        assert [record.id for record in again.lineage] == ids
        assert again.contents() == again.contents(ids[0]) == live
    replica.backend.prune(1, frozenset())
    assert [record.present for record in replica.lineage][1:] == [False] * (len(replica.lineage) - 1)


def test_killed_in_a_drop(place, kind):
    """Of a preserved copy: it is there whole, or gone, and the others are untouched."""
    case = Case(place, "diverged", "first")
    case.commit()
    steps = steps_of(kind, lambda step: case.target.again(step=step).backend.drop(case.target.preserved[0].id))
    for number, at in enumerate(steps):
        case = Case(place, "diverged", f"vm{number}")
        copies = case.commit()
        gone = copies[number % len(copies)]
        assert killed(lambda step, case=case, gone=gone: case.target.again(step=step).backend.drop(gone.id), at), at
        again = case.target.again()
        again.backend.recover()
        if gone in again.preserved:
            again.backend.drop(gone.id)
        del case.own["live" if gone.live else gone.based_on]
        case.check_done()
        whole(again)


# Out of space.


def looks_when_full(kind: Kind) -> None:
    if not kind.looks_when_full:
        pytest.skip("looking into it takes room: its own tests fill it in a commit and while receiving")


@pytest.mark.parametrize("scenario", ["stale", "diverged"])
def test_full_disk_in_a_commit(small, kind, scenario):
    """The disk fills up at a step: refused, or done; never torn, and done once there is room."""
    looks_when_full(kind)
    with small.place() as place:
        steps = steps_of(kind, Case(place, scenario, "first").commit, "commit.")
        for at, case in zip(steps, cases(place, scenario, "vm"), strict=False):
            assert reason_of(lambda case=case, at=at: case.commit(Steps(at, lambda: small.fill("b")))) in FULL
            shown = case.check_one_whole()
            small.make_room("b")
            came = case.recover()
            assert came is shown or kind.may_be_absent, at
            if came:
                case.commit()
                case.check_done()


def test_full_disk_in_the_middle_of_receiving(small, kind):
    """It fills up after the first piece: the target is as it was, and the transfer ends once there is room."""
    looks_when_full(kind)
    with small.place() as place:
        case = Case(place, "stale")
        case.target.backend.discard_stage()
        work = Steps(At("test.piece"), lambda: small.fill("b"))
        assert reason_of(lambda: receiving(case)(work)) in FULL
        close_stages()
        assert case.check_one_whole() is False
        small.make_room("b")
        assert case.recover() is False
        case.target.again().backend.discard_stage()
        assert case.target.debris() == []
        case.fill()
        case.commit()
        case.check_done()


def test_full_disk_in_a_snapshot(small, kind):
    with small.place() as place:
        replica = place.replica("b")
        replica.create()
        steps = steps_of(kind, lambda step: replica.again(step=step).snapshot())
        for number, at in enumerate(steps):
            replica.edit(number)
            before, live = replica.lineage, replica.contents()
            filling = replica.again(step=Steps(at, lambda: small.fill("b")))
            reason = reason_of(filling.snapshot)
            assert reason in FULL
            small.make_room("b")
            again = replica.again()
            again.backend.recover()
            if reason and again.lineage != before:  # refused, and there all the same: only once it was decided
                decided = deciding(kind, "snapshot", steps)
                assert decided is not None
                assert number >= decided
            else:
                assert (again.lineage == before) is bool(reason)
            if again.lineage == before:
                again.snapshot()
            whole(again)
            assert again.contents() == again.contents(again.lineage.tip_id) == live


def test_no_step_was_left_out(kind):
    """Whatever the backend calls a step was killed at above, and it calls none that it has not named."""
    assert len(set(kind.steps)) == len(kind.steps)
    if not SEEN[kind.name]:
        pytest.skip("tells only after all others of this module")
    assert SEEN[kind.name] - {"test.piece"} == set(kind.steps)
