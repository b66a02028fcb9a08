"""One thread for each disk: in order, bounded, and no burden on anybody else when the disk hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest

from agent.slots import Slots
from agent.stream.work import Stopped
from agent.worker import Worker
from resilver.errors import Unavailable


def test_jobs_run_in_order_and_one_at_a_time():
    worker, seen = Worker("disk"), []
    futures = [worker.submit(lambda number=number: seen.append(number)) for number in range(50)]
    for future in futures:
        future.result(5)
    assert seen == list(range(50))
    worker.close()


def test_an_error_belongs_to_whoever_waits():
    worker = Worker("disk")
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)
    assert worker.call(lambda: 7) == 7
    assert worker.busy_s == 0
    worker.close()


async def test_a_disk_that_hangs_refuses_what_it_cannot_take():
    worker, hangs, begun = Worker("disk of vm1", jobs_max=2), threading.Event(), threading.Event()

    def hang():
        begun.set()
        hangs.wait(10)

    stuck = worker.submit(hang)
    assert begun.wait(5)
    waiting = [worker.submit(lambda: 1) for _ in range(2)]
    with pytest.raises(Unavailable, match="disk of vm1") as caught:
        worker.submit(lambda: 1)
    assert caught.value.reason == "DEADLINE"
    assert worker.busy_s > 0
    worker.close()
    hangs.set()
    await asyncio.wrap_future(stuck)
    assert [await asyncio.wrap_future(future) for future in waiting] == [1, 1]


async def test_a_caller_that_goes_away_does_not_stop_the_work():
    worker, hangs, done = Worker("disk"), threading.Event(), threading.Event()
    calling = asyncio.create_task(worker.run(lambda: (hangs.wait(10), done.set())))
    await asyncio.sleep(0.05)
    calling.cancel()
    hangs.set()
    assert await asyncio.to_thread(done.wait, 5)
    worker.close()


def test_slots_are_given_in_the_order_in_which_they_were_asked_for():
    slots, never, order = Slots(1), threading.Event(), []
    slots.take(never)
    asked = [threading.Event() for _ in range(3)]

    def wait(number):
        asked[number].set()
        slots.take(never)
        order.append(number)
        slots.give_back()

    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        assert asked[number].wait(5)
        while slots.waiting_count <= number:
            threading.Event().wait(0.001)
    slots.give_back()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2]


def test_whoever_stops_waiting_is_in_nobodys_way():
    slots, stop, never = Slots(1), threading.Event(), threading.Event()
    slots.take(never)
    stop.set()
    with pytest.raises(Stopped):
        slots.take(stop)
    slots.resize(2)
    slots.take(never)


def test_whoever_works_long_can_see_that_others_wait():
    worker, go = Worker("disk"), threading.Event()
    seen = []

    def work():
        seen.append(worker.waiting)
        go.wait(10)
        seen.append(worker.waiting)

    first = worker.submit(work)
    second = worker.submit(lambda: None)
    go.set()
    first.result(10)
    second.result(10)
    assert seen[1]
    worker.close()


def alive(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def gone(name):
    for thread in alive(name):
        thread.join(10)
    return not alive(name)


def test_there_is_a_thread_only_while_there_is_work():
    worker, order = Worker("a quiet disk", idle_s=0.05), []
    assert not alive("a quiet disk")
    for number in range(3):
        assert worker.call(partial(order.append, number)) is None
        assert len(alive("a quiet disk")) <= 1
        assert gone("a quiet disk")
    # Ends and beginnings that fall together lose nothing and keep the order.
    worker = Worker("a hasty disk", idle_s=0.0, jobs_max=1000)
    order = []
    for number in range(1000):
        worker.submit(partial(order.append, number))
        if number % 10 == 0:
            time.sleep(0)
    worker.call(lambda: None)
    assert order == list(range(1000))
    worker.close()


def test_ten_thousand_quiet_disks_are_no_threads():
    workers = [Worker(f"silent disk {number}", idle_s=60) for number in range(10_000)]

    def threads():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("silent disk")]

    assert threads() == []
    workers[-1].call(lambda: None)
    assert threads() == ["silent disk 9999"]
    workers[-1].close()


def test_what_is_for_later_comes_before_what_is_asked_next():
    worker, order = Worker("disk"), []
    first = worker.submit(partial(order.append, "recover"), later=True)
    assert not first.running()
    worker.call(partial(order.append, "order"))
    assert order == ["recover", "order"]
    other = Worker("another disk")
    waiting = other.submit(lambda: 7, later=True)
    assert not alive("another disk")
    other.wake()
    assert waiting.result(5) == 7
    other.close()
    with pytest.raises(Unavailable, match="stopping"):
        other.submit(lambda: 1)
    worker.close()
