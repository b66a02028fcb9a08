"""Resyncs that somebody wants to end, that are silent, or that wait: what is ordered, and what the record says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coordinator.core import events as e
from coordinator.core.cluster import Cancelling, Pause
from coordinator.core.ending import RESYNCS_KEPT_MAX
from coordinator.core.orders import Done, PrepareSend, Receive, StopTransfer
from coordinator.core.requests import CancelRequest, PauseRequest
from resilver.errors import error_for
from resilver.volume import LiveCopy, LiveState, Progress, ResyncState
from tests.coordinator.core.scenario import Scenario, given

S = ResyncState
PRIMARY = "report a vm1 1-2:s2 1-1:s1 unmodified +record +grant epoch=E1"
STALE = "report b vm1 1-1:s1 unmodified +record"
AT_GOAL = "report b vm1 1-2:s2 1-1:s1 unmodified +record"
NEWCOMER = "report b vm1 empty"
PAUSED = Pause("disk swap", None, "op")


class Play(Scenario):
    """One volume, a its primary; each helper answers what the engine ordered."""

    @classmethod
    def of(cls, members: str = "a,b", replica: str = STALE) -> Play:
        play = cls(e.Loaded(dict([given(f"vm1 1 E1 a {members} 1-2:s2 s1".split())]), {}, {}, {}))
        play.replica = replica
        play.run(f"connect a vm1\nconnect b vm1\n{PRIMARY}\n{replica}\n")
        return play

    def step(self, event: e.Event) -> list[e.Action]:
        return self.engine.step(event, self.now_ms)

    def begun(self) -> str:
        """A resync of b, of which its source has been told; the source's order is in `send`."""
        examine = re.findall(r"examine a1 (i\d+)", self.run("ask r resync vm1"))[0]
        out = self.run(f"{PRIMARY} !{examine}\n{self.replica} !{examine}")
        ((self.send, resync_id),) = re.findall(r"order (i\d+) a send for (i\d+)", out)
        return resync_id

    def running(self) -> str:
        resync_id = self.begun()
        order = self.ordered(self.step(e.OrderAnswered(self.send, Done())), Receive)
        self.run(f"answer {order} progress {resync_id} preparing 0/10")
        return resync_id

    def cancel(self, resync_id: str) -> list[e.Action]:
        return self.step(e.Requested("c", CancelRequest(resync_id, principal="op")))

    def ordered(self, actions: list[e.Action], kind: type) -> str:
        (order,) = [one.order_id for one in actions if isinstance(one, e.GiveOrder) and isinstance(one.order, kind)]
        return order

    def state(self, resync_id: str) -> ResyncState:
        return self.engine.resyncs()[resync_id].state

    def members(self) -> tuple[str, ...]:
        return self.engine.view("vm1").record.members


def orders(actions: list[e.Action], kind: type) -> int:
    return sum(isinstance(one, e.GiveOrder) and isinstance(one.order, kind) for one in actions)


def answered(actions: list[e.Action]) -> list[ResyncState]:
    return [one.answer.state for one in actions if isinstance(one, e.Answer)]


# ------------------------------------------------------------ cancelling


def test_what_its_target_has_not_been_told_is_cancelled_at_once_and_never_told():
    play = Play.of()
    resync_id = play.begun()
    assert answered(play.cancel(resync_id)) == [S.CANCELLED]
    assert not orders(play.step(e.OrderAnswered(play.send, Done())), Receive)


def test_a_run_that_ends_is_cancelled_and_by_whom():
    play = Play.of()
    resync_id = play.running()
    order = play.ordered(play.cancel(resync_id), StopTransfer)
    told = Progress(resync_id, "vm1", S.CANCELLED, 10, 1, 3, reason="CANCELLED", message="cancelled by an operator")
    assert answered(play.step(e.OrderAnswered(order, told))) == [S.CANCELLED]
    assert play.engine.resyncs()[resync_id].refusal.message == "cancelled by op"


def test_a_commit_that_had_begun_is_what_the_record_says():
    play = Play.of("a", NEWCOMER)
    resync_id = play.running()
    order = play.ordered(play.cancel(resync_id), StopTransfer)
    done = play.step(e.OrderAnswered(order, Progress(resync_id, "vm1", S.SUCCEEDED, 10, 1, 10)))
    assert not answered(done), "its report says"
    assert any(isinstance(one, e.SendExamine) for one in done)
    said = play.step(play.events(AT_GOAL.split())[0])
    assert answered(said) == [S.SUCCEEDED]
    assert play.state(resync_id) is S.SUCCEEDED
    assert play.members() == ("a", "b")


def test_a_long_commit_is_neither_cancelled_nor_ordered_again():
    play = Play.of()
    resync_id = play.running()
    play.run(f"progress b {resync_id} committing 10/10")
    order = play.ordered(play.cancel(resync_id), StopTransfer)
    play.step(e.OrderAnswered(order, Progress(resync_id, "vm1", S.COMMITTING, 10, 1, 10)))
    assert "answer c Resync" in play.run("tick 11")
    assert play.state(resync_id) is S.COMMITTING
    play.run("disconnect b")
    came = play.step(play.events(["connect", "b", "vm1"])[0])
    assert (orders(came, StopTransfer), orders(came, PrepareSend), orders(came, Receive)) == (1, 0, 0)
    play.run(f"progress b {resync_id} failed 10/10 IO_ERROR")
    assert play.state(resync_id) is S.FAILED


def test_a_run_that_does_not_end_in_time_is_cancelled_and_told_again():
    play = Play.of()
    resync_id = play.running()
    order = play.ordered(play.cancel(resync_id), StopTransfer)
    play.step(e.OrderAnswered(order, Progress(resync_id, "vm1", S.TRANSFERRING, 10, 1, 5)))
    play.run("tick 11")
    assert play.state(resync_id) is S.CANCELLED
    assert orders(play.step(play.events(f"progress b {resync_id} transferring 6/10".split())[0]), StopTransfer) == 1


def test_a_target_out_of_reach_is_told_when_it_is_back_and_not_at_every_word():
    play = Play.of("a", NEWCOMER)
    resync_id = play.running()
    play.run("disconnect b")
    assert answered(play.cancel(resync_id)) == [S.CANCELLED]
    assert "out of reach" in play.engine.resyncs()[resync_id].refusal.message
    play.run(f"connect b vm1\n{NEWCOMER}")
    told = [play.step(play.events(f"progress b {resync_id} transferring {at}/10".split())[0]) for at in range(5)]
    assert [orders(one, StopTransfer) for one in told] == [1, 0, 0, 0, 0]
    play.step(e.OrderAnswered(play.ordered(told[0], StopTransfer), Done()))
    play.run("tick 6")
    assert orders(play.step(play.events(f"progress b {resync_id} transferring 9/10".split())[0]), StopTransfer) == 1


def test_what_was_finished_out_of_reach_is_told_once_and_its_replica_is_a_member():
    play = Play.of("a", NEWCOMER)
    resync_id = play.running()
    play.run("disconnect b")
    play.cancel(resync_id)
    done = f"progress b {resync_id} succeeded 10/10"
    assert play.run(f"connect b vm1\n{done}\n{done}\n{AT_GOAL}").count("tell FINISHED_LATE") == 1
    assert play.state(resync_id) is S.CANCELLED
    assert play.members() == ("a", "b")


def test_the_next_leader_stops_what_was_being_cancelled():
    play = Play.of()
    resync_id = play.running()
    play.cancel(resync_id)
    stored = play.engine.resyncs()[resync_id]
    assert stored.cancelling == Cancelling("op")
    entry = play.engine.view("vm1").entry
    later = Play(e.Loaded({"vm1": entry}, {}, {resync_id: stored}, {}))
    later.run(f"connect a vm1\n{PRIMARY}")
    came = later.step(later.events(["connect", "b", "vm1"])[0])
    assert (orders(came, StopTransfer), orders(came, PrepareSend)) == (1, 0)
    gone = error_for("RESYNC_NOT_FOUND", "none")
    later.step(e.OrderAnswered(later.ordered(came, StopTransfer), gone))
    assert later.state(resync_id) is S.CANCELLED


def test_one_that_is_being_cancelled_is_no_answer_to_a_new_request():
    play = Play.of()
    first = play.running()
    play.cancel(first)
    second = play.begun()
    assert second != first
    assert play.state(first) is S.CANCELLED


def test_what_a_newer_resync_replaces_is_stopped():
    play = Play.of()
    first = play.running()
    play.run("report a vm1 1-3:s3 1-2:s2 1-1:s1 unmodified +record +grant epoch=E1")
    examine = re.findall(r"examine a1 (i\d+)", play.run("ask r resync vm1"))[0]
    newer = PRIMARY.replace("1-2:s2", "1-3:s3 1-2:s2")
    assert "b StopTransfer" in play.run(f"{newer} !{examine}\n{STALE} !{examine}")
    assert play.engine.resyncs()[first].refusal.reasons == ("TARGET_CHANGED",)


# ------------------------------------------------------------ silence


def test_whoever_says_the_same_again_is_not_silent():
    play = Play.of()
    resync_id = play.running()
    for _ in range(5):
        play.run(f"progress b {resync_id} verifying 10/10\ntick 400")
    assert play.state(resync_id) is S.VERIFYING
    play.run("tick 901")
    assert play.state(resync_id) is S.FAILED


def test_a_newcomer_that_was_given_up_is_a_member_once_it_has_the_goal():
    play = Play.of("a", NEWCOMER)
    resync_id = play.running()
    play.run(f"progress b {resync_id} committing 10/10\ntick 901\ntick 31")
    assert play.engine.resyncs()[resync_id].refusal.reasons == ("NODE_OFFLINE",)
    assert play.members() == ("a",)
    assert not orders(play.step(play.events(f"progress b {resync_id} committing 10/10".split())[0]), StopTransfer)
    play.run(AT_GOAL)
    assert play.members() == ("a", "b")


def test_a_removed_member_is_not_taken_in_by_a_resync_that_has_succeeded():
    play = Play.of("a", NEWCOMER)
    resync_id = play.running()
    play.run(f"progress b {resync_id} succeeded 10/10\n{AT_GOAL}")
    assert play.state(resync_id) is S.SUCCEEDED
    entry = play.engine.view("vm1").entry
    alone = replace(entry, record=replace(entry.record, members=("a",)))
    later = Play(e.Loaded({"vm1": alone}, {}, dict(play.engine.resyncs()), {}))
    later.run(f"connect a vm1\nconnect b vm1\n{PRIMARY}\n{AT_GOAL}")
    assert later.members() == ("a",)


# ------------------------------------------------------------ figures, records, retries


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (["50/100", "40/100"], (50, 100)),
        (["50/100", "0/30"], (0, 30)),
        (["50/100", "0/100", "60/100"], (60, 100)),
        (["20/100", "10/30", "31/30"], (30, 30)),
    ],
)
def test_what_is_done_never_exceeds_the_whole(told, shown):
    play = Play.of()
    resync_id = play.running()
    for figures in told:
        play.run(f"progress b {resync_id} transferring {figures}")
    progress = play.engine.resyncs()[resync_id].progress
    assert (progress.done_bytes, progress.total_bytes) == shown


def test_resyncs_that_fail_are_forgotten_too():
    play = Play.of()
    for _ in range(RESYNCS_KEPT_MAX + 20):
        resync_id = play.running()
        play.run(f"progress b {resync_id} failed 1/10 NO_SPACE")
    assert len(play.engine.resyncs()) == RESYNCS_KEPT_MAX


def in_use(play: Play, *, used: bool) -> list[e.Action]:
    (event,) = play.events(STALE.split())
    live = LiveCopy(LiveState.UNMODIFIED, in_use=used, based_on="s1")
    return play.step(replace(event, report=replace(event.report, live=live)))


def test_a_blocked_resync_goes_on_at_once_then_after_pauses_and_not_for_ever():
    play = Play.of()
    play.running()
    count = len(play.engine.resyncs())
    pauses_s = []
    for _ in range(40):
        active = play.engine.active_resync("vm1", "b")
        if active is None:
            break
        in_use(play, used=True)
        play.run(f"progress b {active.id} blocked 1/10 IN_USE")
        waited = 0
        in_use(play, used=False)
        while play.engine.active_resync("vm1", "b") is None and waited < 700:
            for _ in range(3):
                in_use(play, used=False)
            play.run("tick 10")
            waited += 10
        pauses_s.append(waited)
    assert pauses_s[:5] == [0, 10, 20, 40, 80]
    assert pauses_s[-1] == 700, "given up"
    assert len(play.engine.resyncs()) - count == 20


# ------------------------------------------------------------ waiting for a place


def queued() -> tuple[Play, str]:
    """A resync whose target has no place for it."""
    play = Play.of()
    limits = play.engine._context.places.limits.pop("b")  # as at a new leader, before b is heard of
    examine = re.findall(r"examine a1 (i\d+)", play.run("ask r resync vm1"))[0]
    play.run(f"{PRIMARY} !{examine}\n{STALE} !{examine}")
    (resync,) = play.engine.resyncs().values()
    assert resync.state is S.QUEUED
    play.limits = limits
    return play, resync.id


def heard(play: Play) -> None:
    play.step(e.AgentHeard("b1", play.limits))


def test_a_pause_holds_back_what_waits_for_a_place_until_it_ends():
    play, resync_id = queued()
    play.step(e.Requested("p", PauseRequest(("vm1",), PAUSED)))
    heard(play)
    assert play.state(resync_id) is S.QUEUED
    play.step(e.Requested("p", PauseRequest(("vm1",), None)))
    assert play.state(resync_id) is S.PREPARING


def test_a_pause_holds_under_the_next_leader():
    play, resync_id = queued()
    play.step(e.Requested("p", PauseRequest(("vm1",), PAUSED)))
    entry = play.engine.view("vm1").entry
    later = Play(e.Loaded({"vm1": entry}, {}, dict(play.engine.resyncs()), {}))
    later.run(f"connect a vm1\nconnect b vm1\n{PRIMARY}\n{STALE}\ntick 1")
    assert later.state(resync_id) is S.QUEUED


@pytest.mark.parametrize(
    ("pause", "known", "state", "reason"),
    [
        (PAUSED, True, S.BLOCKED, "PAUSED"),
        (None, False, S.FAILED, "NODE_OFFLINE"),
    ],
)
def test_what_has_waited_for_a_day_ends_and_says_why(pause, known, state, reason):
    play, resync_id = queued()
    play.step(e.Requested("p", PauseRequest(("vm1",), pause)))
    if known:
        heard(play)
    play.run("tick 86401")
    resync = play.engine.resyncs()[resync_id]
    assert (resync.state, resync.refusal.reasons) == (state, (reason,))
    assert resync.refusal.next_command


def test_a_pause_that_comes_while_other_volumes_are_examined_counts():
    held = ("vm1 1 E1 a a,b 1-2:s2 s1", "vm2 1 E1 a a 1-1:t1")
    volumes = dict(given(line.split()) for line in held)
    play = Play(e.Loaded(volumes, {}, {}, {}))
    other = "report a vm2 1-1:t1 unmodified +record +grant epoch=E1"
    play.run(f"connect a vm1 vm2\nconnect b vm1\n{PRIMARY}\n{STALE}\n{other}")
    examine = re.findall(r"examine a1 (i\d+)", play.run("ask r resync vm1 vm2"))[0]
    play.run(f"{PRIMARY} !{examine}\n{STALE} !{examine}")
    play.step(e.Requested("p", PauseRequest(("vm1",), PAUSED)))
    assert "refused vm1 PAUSED: vm1 is paused: disk swap" in play.run(f"{other} !{examine}")
    assert not play.engine.resyncs()
