"""A request with an id is carried out once."""

from __future__ import annotations

import asyncio

import pytest

from coordinator import api as api_module
from coordinator.front import Front
from coordinator.idempotency import ANSWER_BYTES_MAX, KEPT_MS, Answered
from coordinator.store.sqlite import SqliteStore
from resilver.errors import Exhausted, Invalid, Unavailable
from resilver.v1 import coordinator_pb2 as api
from tests.coordinator.running import WITHIN_S

ID = "6f1d6c58-0f6b-4c9e-9a63-0d6f1a1f7b10"


class Work:
    """Counts how often it was done; waits for `gate` if there is one."""

    def __init__(self, gate: asyncio.Event | None = None, answer_bytes: int = 0) -> None:
        self.count = 0
        self.gate = gate
        self.answer_bytes = answer_bytes
        self.error: Exception | None = None

    async def __call__(self) -> api.StartResyncResponse:
        self.count += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        answer = api.StartResyncResponse()
        answer.resyncs.add(id=str(self.count), principal="x" * self.answer_bytes)
        return answer


def body(volume: str = "vm1") -> api.StartResyncRequest:
    return api.StartResyncRequest(volumes=[volume])


async def test_the_same_request_gets_the_same_answer():
    table, work = Answered(lambda: 0), Work()
    first = await table.once("id1", body(), work)
    assert await table.once("id1", body(), work) == first
    assert work.count == 1
    assert (await table.once("id2", body(), work)).resyncs[0].id == "2"


async def test_without_an_id_it_is_done_each_time():
    table, work = Answered(lambda: 0), Work()
    await table.once("", body(), work)
    await table.once("", body(), work)
    assert work.count == 2


async def test_another_body_or_method_is_refused():
    table, work = Answered(lambda: 0), Work()
    await table.once("id1", body(), work)
    for other in (body("vm2"), api.CreateSnapshotRequest(volumes=["vm1"])):
        with pytest.raises(Invalid) as caught:
            await table.once("id1", other, work)
        assert caught.value.reason == "REQUEST_ID_REUSED"
    assert work.count == 1


async def test_a_retry_joins_what_still_runs_also_when_the_first_caller_has_gone():
    gate = asyncio.Event()
    table, work = Answered(lambda: 0), Work(gate)
    first = asyncio.create_task(table.once("id1", body(), work))
    await asyncio.sleep(0)
    first.cancel()
    retry = asyncio.create_task(table.once("id1", body(), work))
    await asyncio.sleep(0)
    gate.set()
    assert (await retry).resyncs[0].id == "1"
    assert first.cancelled()
    assert work.count == 1


async def test_an_error_is_not_kept():
    table, work = Answered(lambda: 0), Work()
    work.error = Unavailable("NODE_UNREACHABLE", "node a is away")
    with pytest.raises(Unavailable):
        await table.once("id1", body(), work)
    work.error = None
    assert (await table.once("id1", body(), work)).resyncs[0].id == "2"


async def test_an_answer_is_kept_for_a_day():
    now = 0
    table, work = Answered(lambda: now), Work()
    await table.once("id1", body(), work)
    now = KEPT_MS - 1
    await table.once("id1", body(), work)
    assert work.count == 1
    now = KEPT_MS + 1
    await table.once("id1", body(), work)
    assert work.count == 2


async def test_the_oldest_answers_go_first():
    table, work = Answered(lambda: 0, entries_max=2), Work()
    for request_id in ("id1", "id2", "id3"):
        await table.once(request_id, body(), work)
    await table.once("id3", body(), work)
    assert work.count == 3
    await table.once("id1", body(), work)
    assert work.count == 4


async def test_answers_are_bounded_in_bytes():
    table, work = Answered(lambda: 0), Work(answer_bytes=ANSWER_BYTES_MAX // 3)
    for request_id in ("id1", "id2", "id3", "id4"):
        await table.once(request_id, body(), work)
    await table.once("id4", body(), work)
    assert work.count == 4
    await table.once("id1", body(), work)
    assert work.count == 5


async def test_when_all_that_are_kept_still_run_no_more_are_taken():
    gate = asyncio.Event()
    table, work = Answered(lambda: 0, entries_max=1), Work(gate)
    running = asyncio.create_task(table.once("id1", body(), work))
    await asyncio.sleep(0)
    with pytest.raises(Exhausted):
        await table.once("id2", body(), work)
    gate.set()
    await running


async def test_a_caller_who_has_waited_long_enough_is_answered_when_it_asks_again(monkeypatch, tmp_path):
    monkeypatch.setattr(api_module, "ASK_TIMEOUT_S", 0.01)
    store = SqliteStore(tmp_path / "store.db", "test", 10.0)
    served = api_module.Coordinator(Front("test", "c1", "127.0.0.1:1", True, "0", store))
    gate = asyncio.Event()
    work = Work(gate)
    request = api.StartResyncRequest(volumes=["vm1"], request_id=ID)
    for _ in range(2):
        with pytest.raises(Unavailable, match=ID) as caught:
            await served._once(request, work)
        assert caught.value.reason == "DEADLINE"
    gate.set()
    monkeypatch.setattr(api_module, "ASK_TIMEOUT_S", WITHIN_S)
    assert (await served._once(request, work)).resyncs[0].id == "1"
    assert work.count == 1
