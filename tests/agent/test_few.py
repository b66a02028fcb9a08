"""So many disks at once, and those that hang are not among them."""

from __future__ import annotations

import asyncio
import threading

from agent.few import Few
from agent.worker import Worker


class Disk:
    """A worker whose jobs wait until they are let go."""

    def __init__(self, name):
        self.worker = Worker(name)
        self.begun, self.go = threading.Event(), threading.Event()

    def job(self):
        self.begun.set()
        assert self.go.wait(30)
        return 7

    def submit(self):
        return self.worker.submit(self.job)


async def test_no_more_than_so_many_at_once_and_each_in_its_turn():
    few, disks = Few(2, counted_s=60), [Disk(f"disk {number}") for number in range(4)]
    beginning = [asyncio.create_task(few.begin(disk.worker, disk.submit)) for disk in disks]
    await asyncio.gather(*beginning[:2])
    assert all([await asyncio.to_thread(disk.begun.wait, 10) for disk in disks[:2]])
    assert not any(task.done() for task in beginning[2:])
    disks[1].go.set()
    assert await (await beginning[1]) == 7
    await beginning[2]
    assert not beginning[3].done()
    for disk in disks:
        disk.go.set()
    assert [await (await task) for task in beginning] == [7] * 4


async def test_a_disk_that_hangs_takes_nobodys_place():
    few, hung = Few(1, counted_s=0.05), Disk("a disk that hangs")
    first = await few.begin(hung.worker, hung.submit)
    async with asyncio.timeout(30):
        for number in range(3):
            other = Disk(f"another {number}")
            other.go.set()
            assert await (await few.begin(other.worker, other.submit)) == 7
        # Also not anew, with each look that waits behind the one that hangs.
        waiting = [await few.begin(hung.worker, hung.submit) for _ in range(64)]
        assert await few.begin(hung.worker, hung.submit) is None, "its queue is full"
    hung.go.set()
    assert await first == 7
    assert [await one for one in waiting] == [7] * 64
