"""Campaigns over real stores: one leads, it steps down in time, and the next one takes over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

import pytest
from structlog.testing import capture_logs

from coordinator.leadership import SAFETY_S, Leadership
from coordinator.store import open_store
from coordinator.store.base import Write
from coordinator.store.encoding import boottime_s
from resilver.config import CoordinatorConfig, EtcdConfig
from resilver.errors import Conflict
from tests import etcd

TTL_S = 3
_clusters = itertools.count()


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory):
    with etcd.running(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def own_etcd(tmp_path):
    with etcd.running(tmp_path) as running:
        yield running


@pytest.fixture(params=["etcd", "sqlite"])
def url(request, tmp_path):
    return f"sqlite://{tmp_path}/s.db" if request.param == "sqlite" else request.getfixturevalue("shared_etcd").url


@pytest.fixture
def cluster():
    return f"lead{next(_clusters)}"


class Coordinator:
    """A leadership and a record of what it told."""

    def __init__(self, store, name, *, term_wanted=lambda: 0, clock=boottime_s, lead=None):
        self.store = store
        self.reigns = asyncio.Queue()
        self.ends = asyncio.Queue()
        self.leaders = asyncio.Queue()
        self.inner = lead
        self.leadership = Leadership(
            store,
            name,
            f"{name}:7400",
            lease_ttl_s=TTL_S,
            lead=self.lead,
            on_leader=self.leaders.put_nowait,
            term_wanted=term_wanted,
            clock=clock,
        )
        self.task = asyncio.create_task(self.leadership.run())

    async def lead(self, reign, leading):
        self.reigns.put_nowait((reign, leading))
        try:
            if self.inner is not None:
                await self.inner(reign, leading)
            else:
                await asyncio.Event().wait()
        finally:
            self.ends.put_nowait((boottime_s(), leading()))

    async def stop(self):
        self.task.cancel()
        await asyncio.wait({self.task})


@pytest.fixture
async def coordinator(cluster):
    """Starts coordinators on a store's URL; ends them all."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(url, name="c1", **keys):
            config = CoordinatorConfig(
                cluster=cluster, name=name, store=url, lease_ttl_s=TTL_S, etcd=EtcdConfig(timeout_s=1.0)
            )
            store = open_store(config)
            stack.push_async_callback(store.close)
            await store.open()
            started = Coordinator(store, name, **keys)
            stack.push_async_callback(started.stop)
            return started

        yield start


async def soon(queue, within_s=TTL_S + 2.0):
    """What the next leader may take, by the promise to operators."""
    return await asyncio.wait_for(queue.get(), within_s)


async def test_one_leads_and_the_other_knows_whom_to_name(coordinator, url):
    first = await coordinator(url)
    reign, leading = await soon(first.reigns)
    second = await coordinator(url, "c2")
    assert await soon(second.leaders) == reign.leader
    assert first.leadership.current() == reign
    assert second.leadership.current() is None
    assert leading()
    assert second.reigns.empty()


async def test_a_graceful_stop_hands_over_at_once(coordinator, url):
    first = await coordinator(url)
    old, old_leading = await soon(first.reigns)
    second = await coordinator(url, "c2")
    await soon(second.leaders)
    await first.stop()
    assert not old_leading()
    assert await soon(first.leaders) is None
    new, _ = await soon(second.reigns, 2.0)
    assert new.leader.term == old.leader.term + 1
    with pytest.raises(Conflict):
        await first.store.commit(old, [Write("nodes/a", {})])
    await second.store.commit(new, [Write("nodes/a", {})])


async def test_a_reign_outlives_many_leases(coordinator, url):
    first = await coordinator(url)
    reign, leading = await soon(first.reigns)
    second = await coordinator(url, "c2")
    until = boottime_s() + 2 * TTL_S
    while boottime_s() < until:
        assert leading()
        await asyncio.sleep(0.1)
    now = first.leadership.current()
    assert now.leader == reign.leader
    assert now.ends_at > reign.ends_at + TTL_S / 2
    assert second.reigns.empty()
    await first.store.commit(now, [Write("nodes/a", {})])


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_it_steps_down_before_the_lease_can_have_ended(coordinator, own_etcd, how):
    first = await coordinator(own_etcd.url)
    await soon(first.reigns)
    # Long enough for a renewal: it is its end that counts.
    await asyncio.sleep(TTL_S / 2)
    ends_at = first.leadership.current().ends_at
    getattr(own_etcd, how)(0)
    ended_at, still = await soon(first.ends)
    assert not still
    assert ends_at - SAFETY_S <= ended_at < ends_at
    assert await soon(first.leaders) is None
    if how == "stop":
        own_etcd.go_on(0)
    else:
        own_etcd.start(0)
    await asyncio.to_thread(own_etcd.wait, 0)
    # etcd gives a lease its whole time again when a member starts.
    again, _ = await soon(first.reigns, 3 * TTL_S + 2)
    assert again.leader.term == 2


async def test_a_machine_that_slept_has_lost_its_reign(coordinator, url):
    slept_s = 0.0
    first = await coordinator(url, clock=lambda: boottime_s() + slept_s)
    _, leading = await soon(first.reigns)
    slept_s = TTL_S
    assert not leading()
    assert first.leadership.current() is None
    await soon(first.ends, 1.0)


async def test_a_stop_while_a_reign_is_ending_is_a_stop(coordinator, url):
    slept_s = 0.0
    ending, let_go = asyncio.Event(), asyncio.Event()

    async def lead(_reign, _leading):
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await let_go.wait()

    first = await coordinator(url, clock=lambda: boottime_s() + slept_s, lead=lead)
    await soon(first.reigns)
    slept_s = TTL_S
    await asyncio.wait_for(ending.wait(), 5)
    slept_s = 0.0
    first.task.cancel()
    let_go.set()
    done, _ = await asyncio.wait({first.task}, timeout=10)
    assert done
    assert first.task.cancelled()
    assert first.reigns.empty()


async def test_a_stop_just_as_a_reign_has_been_resigned_is_a_stop(coordinator, url, monkeypatch):
    slept_s = 0.0
    first = await coordinator(url, clock=lambda: boottime_s() + slept_s)
    await soon(first.reigns)
    resign = first.store.resign

    async def resign_and_stop(reign):
        await resign(reign)
        first.task.cancel()

    monkeypatch.setattr(first.store, "resign", resign_and_stop)
    slept_s = TTL_S
    done, _ = await asyncio.wait({first.task}, timeout=10)
    assert done
    assert first.task.cancelled()


async def test_a_reign_whose_key_was_taken_ends(coordinator, shared_etcd, cluster):
    first = await coordinator(shared_etcd.url)
    await soon(first.reigns)
    await asyncio.to_thread(shared_etcd.etcdctl, "del", f"/resilver/{cluster}/leader")
    await soon(first.ends, TTL_S)
    again, _ = await soon(first.reigns)
    assert again.leader.term == 2


async def test_a_higher_term_that_was_seen_is_exceeded(coordinator, url):
    wanted = 0

    async def lead(reign, _leading):
        nonlocal wanted
        if reign.leader.term < 50:
            wanted = 50
            raise Conflict("LEADERSHIP_LOST", "an agent has obeyed term 50 already")
        await asyncio.Event().wait()

    first = await coordinator(url, term_wanted=lambda: wanted, lead=lead)
    old, old_leading = await soon(first.reigns)
    new, new_leading = await soon(first.reigns, 1.0)
    assert (old.leader.term, new.leader.term) == (1, 51)
    assert new_leading()
    assert not old_leading()


async def test_reigns_that_fail_at_once_are_begun_slowly(coordinator, url):
    async def lead(_reign, _leading):
        raise Conflict("LEADERSHIP_LOST", "the records cannot be read")

    with capture_logs() as logs:
        first = await coordinator(url, lead=lead)
        await asyncio.sleep(2.5)
        await first.stop()
    assert 2 <= first.reigns.qsize() <= 6
    assert len([line for line in logs if line["event"] == "the reign has ended"]) == 1


async def test_a_bug_ends_the_process_and_gives_the_reign_back(coordinator, url):
    async def lead(_reign, _leading):
        raise ZeroDivisionError

    first = await coordinator(url, lead=lead)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(first.task, 5)
    assert await first.store.leader() is None


async def test_a_store_that_is_down_is_waited_for(coordinator, own_etcd):
    first = await coordinator(own_etcd.url)
    await soon(first.reigns)
    own_etcd.kill(0)
    await soon(first.ends)
    begun = time.monotonic()
    with capture_logs() as logs:
        await asyncio.sleep(3)
    assert len(logs) <= 2
    assert not first.task.done()
    await first.stop()
    assert time.monotonic() - begun < 30
