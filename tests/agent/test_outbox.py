"""What waits to be told: bounded, the newest state, and in the order that matters."""

from __future__ import annotations

import asyncio

from agent.outbox import PROGRESS_PERIOD_S, Answer, Outbox
from resilver.lineage import Lineage, Snapshot
from resilver.volume import Presence, Progress, ReplicaReport, ResyncState


def progress(state=ResyncState.TRANSFERRING, done=0, resync="r1"):
    return Progress(resync, "vm1", state, done_bytes=done)


def report(tip, *, volume="vm1", at=1):
    return ReplicaReport(volume, Presence.PRESENT, lineage=Lineage((Snapshot(tip),)), examine_time_ms=at)


async def told(outbox, count, wait_s=1.0):
    return [await outbox.next(wait_s) for _ in range(count)]


async def test_the_newest_state_takes_the_place_of_what_was_not_sent():
    outbox = Outbox(asyncio.get_running_loop())
    for number in range(1000):
        outbox.put_report(report(f"s{number}", at=number))
        outbox.put_report(report("t", volume="vm2"))
        outbox.put_progress(progress(done=number))
    first, second, third, fourth = await told(outbox, 4, 0.05)
    assert first == progress(done=999)
    assert second == Answer(report("s999", at=999))
    assert third == Answer(report("t", volume="vm2"))
    assert fourth is None


async def test_a_runs_last_word_goes_before_the_report_with_its_tip():
    outbox = Outbox(asyncio.get_running_loop())
    outbox.put_progress(progress(done=1))
    assert await outbox.next(1.0) == progress(done=1)
    outbox.put_report(report("s2"))
    outbox.put_answer(report("s2"), "x1")
    outbox.put_progress(progress(ResyncState.SUCCEEDED, done=2))
    assert await told(outbox, 3, 0.05) == [
        progress(ResyncState.SUCCEEDED, done=2),
        Answer(report("s2"), "x1"),
        None,
    ]


async def test_progress_is_told_five_times_a_second_at_most():
    outbox = Outbox(asyncio.get_running_loop())
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for number in range(3):
        outbox.put_progress(progress(done=number))
        assert await outbox.next(2.0) == progress(done=number)
    assert loop.time() - begun >= 2 * PROGRESS_PERIOD_S
    outbox.put_progress(progress(done=9, resync="r2"))
    assert await outbox.next(0.05) == progress(done=9, resync="r2"), "another run has its own pace"


async def test_an_answer_is_never_older_than_what_was_told():
    outbox = Outbox(asyncio.get_running_loop())
    outbox.put_report(report("s2", at=20))
    assert await outbox.next(1.0) == Answer(report("s2", at=20))
    outbox.put_answer(report("s1", at=10), "x1")
    assert await outbox.next(1.0) == Answer(report("s2", at=20), "x1")


async def test_what_answers_the_same_goes_together_and_nothing_else():
    outbox = Outbox(asyncio.get_running_loop())
    for volume in ("vm1", "vm2", "vm3"):
        outbox.put_answer(report("s", volume=volume), "x1")
    outbox.put_answer(report("s", volume="vm1"), "x2")
    outbox.put_report(report("t", volume="vm4"))
    first = await outbox.next(1.0)
    assert [one.report.volume for one in outbox.with_others(first, 2)] == ["vm1", "vm2"]
    assert outbox.with_others(await outbox.next(1.0), 9) == [Answer(report("s", volume="vm3"), "x1")]
    assert outbox.with_others(await outbox.next(1.0), 9) == [Answer(report("s", volume="vm1"), "x2")]
    assert outbox.with_others(await outbox.next(1.0), 9) == [Answer(report("t", volume="vm4"))]


async def test_a_last_word_that_came_meanwhile_goes_before_what_would_go_together():
    outbox = Outbox(asyncio.get_running_loop())
    outbox.put_answer(report("s1", volume="vm2"), "x1")
    first = await outbox.next(1.0)
    outbox.put_progress(progress(ResyncState.SUCCEEDED, done=2))
    outbox.put_answer(report("s2"), "x1")
    await asyncio.sleep(0)
    assert outbox.with_others(first, 9) == [first]
    assert await told(outbox, 2, 0.05) == [progress(ResyncState.SUCCEEDED, done=2), Answer(report("s2"), "x1")]


async def test_of_two_reports_of_one_millisecond_the_later_one_is_told():
    outbox = Outbox(asyncio.get_running_loop())
    outbox.put_report(report("s1", at=10))
    outbox.put_answer(report("s1", at=10), "x1")
    outbox.put_report(report("s2", at=10))
    assert await told(outbox, 2, 0.05) == [Answer(report("s2", at=10), "x1"), None]


async def test_nothing_is_a_reason_for_a_heartbeat():
    outbox = Outbox(asyncio.get_running_loop())
    assert await outbox.next(0.01) is None
    outbox.put_report(report("s1"))
    await asyncio.sleep(0)
    outbox.clear()
    assert await outbox.next(0.01) is None


async def test_threads_may_tell_also_a_loop_that_has_ended():
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop)
    loop.close()
    await asyncio.to_thread(outbox.put_report, report("s1"))
