"""What many events store goes into few commits, and still before anything that they do."""

from __future__ import annotations

import asyncio
import contextlib
import time

from coordinator.agents import Agents
from coordinator.core.cluster import NodeView, VolumeEntry
from coordinator.core.context import Settings
from coordinator.core.events import AgentConnected, DeletedNode, Persist, Volume
from coordinator.reign import COMMIT_CHARS_MAX, STEPS_AT_ONCE_MAX, CurrentReign, in_commits
from coordinator.store.base import WRITES_MAX, Reign
from coordinator.store.sqlite import SqliteStore
from resilver.errors import Conflict
from resilver.rpc import make_channel
from resilver.volume import VolumeRecord
from tests.coordinator.running import WITHIN_S

COUNT = 300


def node(name: str, version: str = "0") -> NodeView:
    return NodeView(name, address="h:1", stream_address="h:2", version=version)


def test_what_is_stored_together_is_whole_in_order_and_within_the_bounds():
    persists = [Persist((node(f"n{at}"), node(f"m{at}"))) for at in range(WRITES_MAX)]
    commits = list(in_commits(persists))
    assert [key for commit in commits for key in commit] == [
        key for at in range(WRITES_MAX) for key in (f"nodes/n{at}", f"nodes/m{at}")
    ]
    assert [len(commit) for commit in commits] == [WRITES_MAX, WRITES_MAX]
    three = [Persist(tuple(node(f"{letter}{at}") for letter in "abc")) for at in range(WRITES_MAX)]
    assert {len(commit) % 3 for commit in in_commits(three)} == {0}


def test_of_a_record_that_changes_again_the_last_is_stored():
    persists = [Persist((node("a", "1"),)), Persist((node("b"),)), Persist((node("a", "2"),))]
    (commit,) = in_commits(persists)
    assert commit["nodes/a"]["version"] == "2"
    (gone,) = in_commits([*persists, Persist((DeletedNode("a"),))])
    assert gone["nodes/a"] is None


def test_large_records_are_spread_over_commits():
    members = tuple(f"n{at:060d}" for at in range(256))
    persists = [Persist((Volume(f"v{at}", VolumeEntry(VolumeRecord(f"v{at}", members=members))),)) for at in range(40)]
    commits = list(in_commits(persists))
    assert sum(map(len, commits)) == len(persists)
    assert 1 < len(commits) < len(persists)
    assert all(len(repr(commit)) < COMMIT_CHARS_MAX + 10_000 for commit in commits)


class CountingStore(SqliteStore):
    """The store, and how large each commit was."""

    sizes: list[int]
    all_there: asyncio.Event

    async def commit(self, reign, writes):
        self.sizes.append(len(writes))
        revision = await super().commit(reign, writes)
        if sum(self.sizes) >= COUNT:
            self.all_there.set()
        return revision


@contextlib.asynccontextmanager
async def reigning(tmp_path):
    store = CountingStore(tmp_path / "store.db", "test", 10.0)
    store.sizes, store.all_there = [], asyncio.Event()
    store_id = await store.open()
    reign = await store.campaign("c1", "127.0.0.1:1")
    assert isinstance(reign, Reign)
    agents = Agents(make_channel, clock=time.monotonic)
    current = CurrentReign(store, reign, agents, settings=Settings(), cluster="test", store_id=store_id)
    await current.load()
    try:
        yield store, current, store_id
    finally:
        await agents.close()
        await store.close()


async def test_a_crowd_that_comes_at_once_costs_few_commits(tmp_path):
    async with reigning(tmp_path) as (store, current, store_id):
        for at in range(COUNT):
            current.post(AgentConnected(f"s{at}", node(f"n{at}"), "test", store_id, 0))
        working = asyncio.create_task(current.run(lambda: True))
        async with asyncio.timeout(WITHIN_S):
            await store.all_there.wait()
        working.cancel()
        assert len(store.sizes) <= COUNT // STEPS_AT_ONCE_MAX + 2
        assert sorted(await store.read_all()) == sorted(f"nodes/n{at}" for at in range(COUNT))


async def test_nothing_that_any_of_them_does_is_done_unless_all_is_stored(tmp_path):
    async with reigning(tmp_path) as (store, current, store_id):
        outbox = current.open_stream("s1")
        for at in range(3):
            current.post(AgentConnected(f"s{at}", node(f"n{at}"), "test" if at != 1 else "other", store_id, 0))
        await store.resign(current._reign)
        with contextlib.suppress(Conflict):
            await current.run(lambda: True)
        assert store.sizes == [3], "two nodes, and the event of the one that is refused"
        current.end(Conflict("LEADERSHIP_LOST", "over"))
        with contextlib.suppress(Conflict):
            raise AssertionError(f"{await outbox.get()} was sent")


async def test_after_a_term_that_is_to_be_raised_nothing_more_is_decided(tmp_path):
    async with reigning(tmp_path) as (store, current, store_id):
        above = current.engine.identity.term + 5
        current.post(AgentConnected("s0", node("n0"), "test", store_id, above))
        current.post(AgentConnected("s1", node("n1"), "test", store_id, 0))
        with contextlib.suppress(Conflict):
            await current.run(lambda: True)
        assert current.term_wanted == above
        assert store.sizes == [1]
