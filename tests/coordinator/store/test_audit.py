"""Who ordered what outlives the leader that was asked, on every store; and what the API enters."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from grpc import aio

from coordinator.audit import AUDITED
from coordinator.core.cluster import NodeView
from coordinator.core.events import AgentConnected
from resilver.v1 import coordinator_pb2 as api
from tests.coordinator.running import eventually
from tests.coordinator.store.test_events import leading

CHANGING = {
    name
    for name, method in api.DESCRIPTOR.services_by_name["Coordinator"].methods_by_name.items()
    if {"request_id", "take_snapshot"} & set(method.input_type.fields_by_name)
}


async def entries(stub, **fields):
    return list((await stub.ListAuditEntries(api.ListAuditEntriesRequest(page_size=1000, **fields))).entries)


async def until(stub, count, **fields):
    return await eventually(lambda: entries(stub, **fields), lambda found: len(found) >= count)


async def refused(call):
    with pytest.raises(aio.AioRpcError):
        await call


def test_every_call_that_changes_something_is_audited() -> None:
    assert CHANGING - {"PlanResync"} == AUDITED - {"PlanResync"}
    assert len(AUDITED) >= 15


async def test_an_order_and_a_refused_one_are_there_for_the_next_leader(another, monkeypatch) -> None:
    store = await another()
    async with leading(store, monkeypatch) as first:
        await first.stub.AdoptStore(api.AdoptStoreRequest(store_id="s", request_id=str(uuid.uuid4())))
        for number in range(30):
            await refused(first.stub.ElectPrimary(api.ElectPrimaryRequest(volume=f"nobody{number}")))
        await refused(first.stub.AdoptStore(api.AdoptStoreRequest(store_id="another")))
        found = await until(first.stub, 3)
    kept = [key for key in await store.read_all() if key.startswith("audit/")]
    async with leading(store, monkeypatch) as second:
        again = await entries(second.stub)
        done = next(one for one in again if one.result == api.AUDIT_RESULT_DONE)
        no = next(one for one in again if one.method == "ElectPrimary")
        assert len(kept) == len(again) == 3, "thirty of one kind are one record"
        assert [one.sequence for one in again] == [one.sequence for one in found]
        assert (done.method, done.address, done.attempt_count) == ("AdoptStore", "127.0.0.1", 1)
        assert done.request == '{"store_id":"s"}'
        assert done.end_time.ToNanoseconds() >= done.create_time.ToNanoseconds() > 0
        assert (no.result, no.reason) == (api.AUDIT_RESULT_REFUSED, "VOLUME_NOT_FOUND")
        assert "nobody" in no.message
        assert await entries(second.stub, result=api.AUDIT_RESULT_DONE) == [done]
        assert await entries(second.stub, principal="nobody") == []
        assert len(await entries(second.stub, principal=done.principal)) == 3
        pages, token = [], ""
        while token or not pages:
            request = api.ListAuditEntriesRequest(page_size=1, page_token=token)
            answer = await second.stub.ListAuditEntries(request)
            pages += answer.entries
            token = answer.next_page_token
        assert pages == again


async def test_what_is_only_tried_out_is_not_entered(another, monkeypatch) -> None:
    store = await another()
    async with leading(store, monkeypatch) as one:
        await one.stub.AdoptStore(api.AdoptStoreRequest(store_id="s", validate_only=True))
        await refused(one.stub.ElectPrimary(api.ElectPrimaryRequest(volume="nobody", validate_only=True)))
        await refused(one.stub.PlanResync(api.PlanResyncRequest(volumes=["nobody"])))
        await refused(one.stub.PlanResync(api.PlanResyncRequest(volumes=["nobody"], take_snapshot=True)))
        (found,) = await until(one.stub, 1)
        assert (found.method, list(found.volumes)) == ("PlanResync", ["nobody"])


async def test_what_is_asked_again_under_its_id_is_one_order(another, monkeypatch) -> None:
    store = await another()
    async with leading(store, monkeypatch) as one:
        request = api.AdoptStoreRequest(store_id="s", request_id=str(uuid.uuid4()))
        await asyncio.gather(*(one.stub.AdoptStore(request) for _ in range(5)))
        assert len(await entries(one.stub)) == 1


async def test_a_field_that_is_wrong_is_named(another, monkeypatch) -> None:
    store = await another()
    async with leading(store, monkeypatch) as one:
        for field, value in (("volume", "a/b"), ("result", 77), ("principal", "x" * 999)):
            with pytest.raises(aio.AioRpcError, match=field):
                await entries(one.stub, **{field: value})


async def test_an_order_whose_leader_ends_is_there_without_an_answer(another, monkeypatch) -> None:
    store = await another()
    async with leading(store, monkeypatch) as first:
        # An agent that offers a volume and never says what it has: the election waits for it.
        first.current.post(AgentConnected("a1", NodeView("a", "a1", "a:1", "a:2", "1", ("vm1",)), "demo", "s", 0))
        order = asyncio.ensure_future(first.stub.ElectPrimary(api.ElectPrimaryRequest(volume="vm1", choose_node="a")))
        (begun,) = await until(first.stub, 1)
        assert begun.result == api.AUDIT_RESULT_UNKNOWN
        assert not order.done()
    await asyncio.wait([order])
    assert order.cancelled() or order.exception() is not None
    async with leading(store, monkeypatch) as second:
        (found,) = await entries(second.stub, volume="vm1", result=api.AUDIT_RESULT_UNKNOWN)
        assert found == begun
        assert (found.method, found.request) == ("ElectPrimary", '{"choose_node":"a","volume":"vm1"}')
        assert not found.HasField("end_time")
