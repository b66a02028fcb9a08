"""The cap of a node: as a bucket with a clock moved by hand, and under real connections."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delta import DeltaMap, DeltaRange
from agent.stream.sender import BlockServer
from agent.stream.throttle import BURST_S, UNPAID_S, Bucket, Throttle
from agent.stream.work import Stopped
from resilver.address import Address
from resilver.errors import ResilverError

from .support import MIB, FileStage, Proxy, Transfer, at, authorize, random_file, same, serving, until

RATES = st.integers(64 * 1024, 1 << 30)


class Mover:
    """Moves a piece, waits until it has paid, rests for a while, and so on."""

    def __init__(self, rests: list[float]) -> None:
        self.rests = rests
        self.at = 0
        self.asked = False
        self.ready_at = 0.0


def _played(bucket: Bucket, movers: list[Mover], until_s: float) -> list[tuple[float, int, int]]:
    """Everything that was moved: when, by whom, how much."""
    now, moved = 0.0, []
    while now < until_s:
        soonest = until_s
        for number, mover in enumerate(movers):
            if not mover.asked and now >= mover.ready_at:
                piece = bucket.piece_bytes(len(movers))
                moved.append((now, number, piece))
                bucket.ask(mover, piece)
                mover.asked = True
        for mover in movers:
            if not mover.asked:
                soonest = min(soonest, mover.ready_at)
            elif (wait_s := bucket.wait_s(mover, now)) == 0:
                mover.asked = False
                mover.ready_at = now + mover.rests[mover.at % len(mover.rests)]
                mover.at += 1
                soonest = min(soonest, mover.ready_at)
            elif wait_s is not math.inf:
                soonest = min(soonest, now + wait_s)
        now = max(soonest, now + 1e-6)
    return moved


@settings(max_examples=60, deadline=None)
@given(RATES, st.lists(st.lists(st.floats(0, 3), min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_stretch_of_time_sees_more_than_the_cap(rate, rests):
    moved = _played(Bucket(rate, 0.0), [Mover(each) for each in rests], 8.0)
    times = [when for when, _who, _count in moved]
    total = [0]
    for _when, _who, count in moved:
        total.append(total[-1] + count)
    slack = rate * (BURST_S + UNPAID_S) + len(rests) + 1
    for first, start in enumerate(times):
        for last in range(first, len(times), 7):
            assert total[last + 1] - total[first] <= rate * (times[last] - start) + slack


@settings(max_examples=40, deadline=None)
@given(RATES, st.integers(1, 12))
def test_those_who_always_want_more_get_the_same_and_together_all_of_it(rate, count):
    moved = _played(Bucket(rate, 0.0), [Mover([0.0]) for _ in range(count)], 4.0)
    each = Counter()
    for _when, who, size in moved:
        each[who] += size
    assert len(each) == count
    assert max(each.values()) - min(each.values()) <= 2 * Bucket(rate, 0).piece_bytes(count)
    assert 0.98 * rate * 4 <= sum(each.values()) <= 1.05 * rate * 4


@given(RATES, RATES)
def test_a_new_cap_counts_from_now_on(before, after):
    bucket, mover = Bucket(before, 0.0), object()
    bucket.ask(mover, bucket.piece_bytes(1))
    bucket.set(after, 0.0)
    assert 0 < bucket.wait_s(mover, 0.0) <= max(BURST_S, UNPAID_S * before / after) + 1e-3
    bucket.set(0, 0.0)
    assert bucket.wait_s(mover, 0.0) == 0


def test_nothing_is_saved_up_in_a_pause():
    bucket, mover = Bucket(1000, 0.0), object()
    held = int(1000 * BURST_S)
    bucket.ask(mover, held)
    assert bucket.wait_s(mover, 3600.0) == 0
    bucket.ask(mover, held)
    assert bucket.wait_s(mover, 3600.0) == pytest.approx(held / 1000)


def test_who_gives_up_waiting_has_had_its_bytes():
    bucket, one, other = Bucket(1000, 0.0), object(), object()
    bucket.ask(one, 50)
    bucket.forget(one)
    bucket.ask(other, 50)
    assert bucket.wait_s(other, 0.0) == pytest.approx(0.1)


def test_a_stop_is_noticed_while_waiting():
    throttle, stop = Throttle(1000), threading.Event()
    share = throttle.share()
    share.open()

    def look():
        if stop.is_set():
            raise Stopped

    ended = []

    def wait():
        try:
            share.spend(1000_000, look)
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    share_of_another = throttle.share()
    stop.set()
    thread.join(20)
    assert ended == [True]
    assert share_of_another.room(memoryview(bytes(MIB))).nbytes == 1000 * UNPAID_S


def test_a_cap_that_is_lifted_frees_those_who_wait():
    throttle = Throttle(1000)
    share = throttle.share()
    share.open()
    thread = threading.Thread(target=share.spend, args=(1000_000, lambda: None), daemon=True)
    thread.start()
    throttle.set(0)
    thread.join(20)
    assert not thread.is_alive()
    assert share.room(memoryview(bytes(MIB))).nbytes == MIB


def _windows(samples: list[tuple[float, int]], window_s: float) -> float:
    """The most bytes that came in any stretch of that length, per second of it."""
    most, first, within = 0, 0, 0
    for when, count in samples:
        within += count
        while samples[first][0] <= when - window_s:
            within -= samples[first][1]
            first += 1
        most = max(most, within)
    return most / window_s


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return random_file(tmp_path_factory.mktemp("throttle") / "image", 6 * MIB)


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_transfer_keeps_to_the_cap_of_either_side(image, tmp_path, side):
    """Counted between the two."""
    cap, samples = 2_000_000, []
    throttles = {side: Throttle(cap)}
    delta = DeltaMap.of(6 * MIB, [DeltaRange(0, 6 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 6 * MIB), delta)

    def passed(data, _passed):
        samples.append((time.monotonic(), len(data)))

    with serving(image, throttle=throttles.get("send")) as server, Proxy(server.port, passed) as proxy:
        transfer.run(at(proxy.port), throttle=throttles.get("receive"))
    assert same(image, transfer.stage.path, delta)
    assert samples[-1][0] - samples[0][0] > 2.5
    assert _windows(samples, 2.5) <= 1.1 * cap


@pytest.mark.parametrize(("side", "idle_s"), [("send", 20.0), ("receive", 2.0)])
def test_a_slow_cap_is_nobodys_silence(image, tmp_path, side, idle_s):
    """One frame takes three seconds, and nobody is left for that: neither a source nor its client."""
    throttles = {side: Throttle(100_000)}
    delta = DeltaMap.of(6 * MIB, [DeltaRange(0, 300_000)])
    transfer = Transfer(FileStage(tmp_path / "stage", 6 * MIB), delta)
    with serving(image, throttle=throttles.get("send"), idle_timeout_s=2.5) as server:
        received = transfer.run(at(server.port), silence=1.0, idle=idle_s, throttle=throttles.get("receive"))
    assert received.problems == ()
    assert received.counters.resent_bytes == 0
    assert same(image, transfer.stage.path, delta)


def test_a_source_that_stops_does_not_wait_for_the_cap(image, tmp_path):
    delta = DeltaMap.of(6 * MIB, [DeltaRange(0, 6 * MIB)])
    transfer = Transfer(FileStage(tmp_path / "stage", 6 * MIB), delta)
    server = BlockServer(Address("127.0.0.1", 0), authorize(image), throttle=Throttle(100_000))
    server.start()
    port = server.port
    ended: list[str] = []

    def run():
        try:
            transfer.run(at(port), idle=1.0)
        except ResilverError as error:
            ended.append(error.reason)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: any(counters.wire_bytes > 0 for counters in transfer.seen))
    assert server.stop(10.0)
    thread.join(30)
    assert ended == ["NO_SOURCE"]  # and not SOURCE_DAMAGED: half a frame is no damage
