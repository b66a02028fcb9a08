"""What every store keeps to, on a real etcd and on a real file."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from coordinator.store.base import ABSENT, COMMIT_BYTES_MAX, RECORD_BYTES_MAX, WRITES_MAX, Leader, Reign, Write
from coordinator.store.encoding import boottime_s
from resilver.errors import Conflict, Exhausted


async def reign_of(store, name="c1", **keys) -> Reign:
    reign = await store.campaign(name, f"{name}:7400", **keys)
    assert isinstance(reign, Reign), reign
    return reign


async def test_the_store_has_one_id_for_ever(another):
    first, second = await another(), await another()
    ids = {await first.open(), await second.open()}
    assert len(ids) == 1
    uuid.UUID(ids.pop())


async def test_many_that_come_first_at_once_agree_on_the_id(another):
    stores = await asyncio.gather(*(another() for _ in range(4)))
    assert len(set(await asyncio.gather(*(store.open() for store in stores)))) == 1


async def test_terms_grow_over_reigns(another):
    store = await another()
    terms, ids = [], set()
    for above in (0, 0, 41, 7):
        reign = await reign_of(store, above_term=above)
        terms.append(reign.leader.term)
        ids.add(reign.leader.leader_id)
        await store.resign(reign)
    assert terms == [1, 2, 42, 43]
    assert len(ids) == 4


async def test_terms_outlive_every_coordinator(another):
    store = await another()
    await store.resign(await reign_of(store, above_term=9))
    await store.close()
    assert (await reign_of(await another())).leader.term == 11


async def test_the_second_to_campaign_sees_the_first(another):
    first, second = await another(), await another()
    assert await second.leader() is None
    reign = await reign_of(first)
    assert reign.leader.name == "c1"
    assert reign.leader.address == "c1:7400"
    assert reign.leader.version
    assert await second.campaign("c2", "c2:7400", above_term=100) == reign.leader
    assert await second.leader() == reign.leader
    assert await first.leader() == reign.leader


async def test_one_of_many_wins(another):
    stores = [await another() for _ in range(5)]
    answers = await asyncio.gather(*(store.campaign(f"c{i}", "h:1") for i, store in enumerate(stores)))
    (reign,) = [answer for answer in answers if isinstance(answer, Reign)]
    assert all(isinstance(answer, Leader | Reign) for answer in answers)
    assert await stores[0].leader() == reign.leader


async def test_a_lease_is_counted_from_before_the_renewal(another):
    store = await another(lease_ttl_s=5)
    begun = boottime_s()
    reign = await reign_of(store)
    assert begun + 5 <= reign.ends_at <= boottime_s() + 5
    begun = boottime_s()
    renewed = await store.renew(reign)
    assert begun + 5 <= renewed.ends_at <= boottime_s() + 5
    assert (renewed.leader, renewed.revision, renewed.lease) == (reign.leader, reign.revision, reign.lease)


async def test_resigning_lets_another_in_at_once_and_does_no_harm_twice(another):
    first, second = await another(), await another()
    old = await reign_of(first)
    await first.resign(old)
    await first.resign(old)
    assert await second.leader() is None
    new = await reign_of(second, "c2")
    await first.resign(old)
    assert await second.leader() == new.leader
    await second.renew(new)


async def test_whoever_campaigns_again_ends_its_own_reign(another):
    store = await another()
    old = await reign_of(store)
    new = await reign_of(store)
    assert new.leader.term == old.leader.term + 1
    with pytest.raises(Conflict) as caught:
        await store.commit(old, [Write("volumes/vm1", {})])
    assert caught.value.reason == "LEADERSHIP_LOST"
    with pytest.raises(Conflict):
        await store.renew(old)
    await store.commit(new, [Write("volumes/vm1", {})])


async def test_a_commit_is_read_back(another):
    store = await another()
    reign = await reign_of(store)
    value = {"name": "vm1 é", "list": [1, 2.5, None, True], "map": {"a": ""}}
    revision = await store.commit(reign, [Write("volumes/vm1", value, ABSENT), Write("nodes/a", {})])
    records = await (await another()).read_all()
    assert set(records) == {"volumes/vm1", "nodes/a"}
    assert records["volumes/vm1"].value == value
    assert records["volumes/vm1"].revision == records["nodes/a"].revision == revision


async def test_expected_revisions(another):
    store = await another()
    reign = await reign_of(store)
    one = await store.commit(reign, [Write("volumes/vm1", {"v": 1}, ABSENT)])
    two = await store.commit(reign, [Write("volumes/vm1", {"v": 2}, one)])
    assert two > one
    for stale in (ABSENT, one):
        with pytest.raises(Conflict) as caught:
            await store.commit(reign, [Write("nodes/a", {}), Write("volumes/vm1", {"v": 3}, stale)])
        assert caught.value.reason == "LEADERSHIP_LOST"
        assert caught.value.metadata["key"] == "volumes/vm1"
    records = await store.read_all()
    assert set(records) == {"volumes/vm1"}
    assert records["volumes/vm1"].value == {"v": 2}


async def test_deleting(another):
    store = await another()
    reign = await reign_of(store)
    one = await store.commit(reign, [Write("nodes/a", {}, ABSENT), Write("nodes/b", {}, ABSENT)])
    with pytest.raises(Conflict):
        await store.commit(reign, [Write("nodes/a", None, one + 100)])
    await store.commit(reign, [Write("nodes/a", None, one), Write("nodes/none", None)])
    assert set(await store.read_all()) == {"nodes/b"}
    await store.commit(reign, [Write("nodes/a", {}, ABSENT)])
    assert set(await store.read_all()) == {"nodes/a", "nodes/b"}


async def test_an_empty_commit_only_asks_whether_the_reign_lasts(another):
    store = await another()
    reign = await reign_of(store)
    await store.commit(reign, [])
    await store.resign(reign)
    with pytest.raises(Conflict) as caught:
        await store.commit(reign, [])
    assert "nobody leads now" in caught.value.message


async def test_a_deposed_reign_cannot_write(another):
    first, second = await another(), await another()
    old = await reign_of(first)
    await first.commit(old, [Write("volumes/vm1", {"v": 1})])
    await first.resign(old)
    new = await reign_of(second, "c2")
    with pytest.raises(Conflict) as caught:
        await first.commit(old, [Write("volumes/vm1", {"v": 2})])
    assert "c2 leads now, in term 2" in caught.value.message
    with pytest.raises(Conflict):
        await first.renew(old)
    await second.commit(new, [Write("volumes/vm1", {"v": 3})])
    assert (await first.read_all())["volumes/vm1"].value == {"v": 3}


async def test_everything_is_read_as_of_one_moment(another):
    """While a writer moves a mark from record to record, no reader sees it twice or not at all."""
    store, reader = await another(), await another()
    reign = await reign_of(store)
    count = 1100
    keys = [f"elections/vm1/{index:06d}" for index in range(count)]
    for start in range(0, count, WRITES_MAX):
        await store.commit(reign, [Write(key, {"mark": False, "pad": "x" * 900}) for key in keys[start:][:WRITES_MAX]])
    await store.commit(reign, [Write(keys[0], {"mark": True})])
    stop = asyncio.Event()

    async def move():
        at = 0
        while not stop.is_set():
            # A stride that is prime to the count: it jumps over the pages in both directions.
            to = (at + 379) % count
            await store.commit(reign, [Write(keys[at], {"mark": False}), Write(keys[to], {"mark": True})])
            at = to
            # SQLite's readers ask for their lock every now and then, and must find it free within five seconds.
            await asyncio.sleep(0.002)

    moving = asyncio.create_task(move())
    try:
        for _ in range(20):
            records = await reader.read_all()
            assert len(records) == count
            assert sum(record.value["mark"] for record in records.values()) == 1
    finally:
        stop.set()
        await moving


async def test_large_records_fill_pages(another):
    store = await another()
    reign = await reign_of(store)
    pad = "x" * (64 << 10)
    for batch in range(15):
        await store.commit(reign, [Write(f"elections/vm1/{batch:03d}{index:03d}", {"pad": pad}) for index in range(20)])
    records = await store.read_all()
    assert len(records) == 300
    assert all(record.value["pad"] == pad for record in records.values())


async def test_the_bounds_of_a_commit(another):
    store = await another()
    reign = await reign_of(store)
    await store.commit(reign, [Write(f"nodes/{index}", {}, ABSENT) for index in range(WRITES_MAX)])
    most = "x" * (RECORD_BYTES_MAX - 50)
    fits = [Write(f"resyncs/vm1/{index}", {"pad": most}) for index in range(COMMIT_BYTES_MAX // RECORD_BYTES_MAX)]
    await store.commit(reign, fits)
    for writes in (
        [Write(f"nodes/{index}", {}) for index in range(WRITES_MAX + 1)],
        [Write("nodes/a", {"pad": "x" * RECORD_BYTES_MAX})],
        [*fits, Write("nodes/a", {"pad": most})],
    ):
        with pytest.raises(Exhausted) as caught:
            await store.commit(reign, writes)
        assert caught.value.reason == "TOO_LARGE"
    assert len(await store.read_all()) == WRITES_MAX + len(fits)
    await store.renew(reign)


async def test_records_of_the_store_itself_are_not_in_what_is_read(another):
    store = await another()
    await reign_of(store)
    assert await store.read_all() == {}


async def test_health(another, url):
    health = await (await another()).health()
    assert (health.kind, health.healthy_count, health.member_count) == (url.partition(":")[0], 1, 1)


async def test_a_closed_store_frees_nothing_that_another_reign_needs(another):
    first, second = await another(), await another()
    reign = await reign_of(first)
    await second.close()
    await second.close()
    await first.commit(reign, [Write("nodes/a", {})])
