"""A running agent puts a torn image together by itself, between whatever else its volume has to do."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

import pytest

from agent import node
from agent.backends.image_compact import PART_BYTES
from agent.examiner import ReplicaSettings
from agent.few import Few
from agent.identity import Identity
from agent.replica import Replica
from tests.agent.backends.fragments import SEAMS_MAX, Picture, check_same, seams, torn
from tests.agent.backends.replica import BLOCK, noise
from tests.loopfs import needs_root

DEADLINE_S = 60.0


@pytest.fixture
def image(xfs):
    made = torn(xfs / "torn")
    yield made
    shutil.rmtree(xfs / "torn")


@pytest.fixture
def replica(image, tmp_path):
    identity = Identity(tmp_path / "state", "prod", "a")
    made = Replica("vm1", "a", image.backend, identity, ReplicaSettings())
    yield made
    made.close()
    identity.close()


async def until_compacted(image):
    async with asyncio.timeout(DEADLINE_S):
        while seams(image.path) > SEAMS_MAX // 2:  # noqa: ASYNC110  # the disk has no event to wait for
            await asyncio.sleep(0.02)


@needs_root
async def test_a_torn_image_is_compacted(image, replica, monkeypatch):
    monkeypatch.setattr(node, "COMPACT_LOOK_S", 0.1)
    before = Picture(image)
    task = asyncio.create_task(node._compact_all([replica], Few(4)))
    await until_compacted(image)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await replica.worker.run(lambda: None)  # the part that is under way is done
    check_same(image, before)


@needs_root
async def test_what_befalls_one_volume_does_not_hold_up_the_others(image, replica, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "COMPACT_LOOK_S", 0.1)
    asked = []

    def broken():
        asked.append(1)
        raise RuntimeError("unforeseen")

    identity = Identity(tmp_path / "other", "prod", "a")
    other = Replica("vm2", "a", image.backend, identity, ReplicaSettings())
    monkeypatch.setattr(other, "compact", broken)
    task = asyncio.create_task(node._compact_all([other, replica], Few(4)))
    async with asyncio.timeout(DEADLINE_S):
        while len(asked) < 3:  # noqa: ASYNC110  # it is asked again and again, and tells nobody
            await asyncio.sleep(0.02)
    await until_compacted(image)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    other.close()
    identity.close()


@needs_root
async def test_it_makes_room_for_other_jobs(image, replica):
    """A part, and then whoever waits; with nobody waiting, as many as there is time for."""
    image.write(0, noise(1, 2 * PART_BYTES))
    image.snapshot()
    for at in range(0, 2 * PART_BYTES, 8 * BLOCK):
        image.write(at, noise(at, BLOCK))
    image.snapshot()
    torn_by = seams(image.path)
    queued = []

    def first():
        queued.append(replica.worker.submit(lambda: seams(image.path)))
        return replica.compact()

    assert await replica.worker.run(first), "there are two parts to be done"
    after_one = queued[0].result(DEADLINE_S)
    assert SEAMS_MAX // 2 < after_one < torn_by
    while await replica.worker.run(replica.compact):
        pass
    assert seams(image.path) <= SEAMS_MAX // 2


@needs_root
async def test_what_goes_wrong_is_told_and_ends_nothing(image, replica):
    """A mark that cannot be read: a problem for the log, and not for the volume."""
    (image.root / "compact.json").write_bytes(b"{}")
    assert await replica.worker.run(replica.compact) is False
    assert replica._not_compacted.endswith("does not match its digest")
    assert image.snapshot().cp.sequence == 6
