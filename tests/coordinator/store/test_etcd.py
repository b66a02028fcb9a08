"""What only etcd can do to us: members that die or hang, leases that run out, keys that others write."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from coordinator.store import etcd as adapter
from coordinator.store import open_store
from coordinator.store.base import Reign, Write
from resilver.errors import Conflict, Damaged, Invalid, Unavailable
from tests.coordinator.store.conftest import config_of

# Three tries of a member's timeout, and what a busy machine needs on top.
BOUND_S = 12.0


async def led(store, bound_s=BOUND_S) -> Reign:
    """Campaigns until it is won, as a coordinator does."""
    deadline = time.monotonic() + bound_s
    while True:
        try:
            answer = await store.campaign("c1", "c1:7400")
        except Unavailable:
            answer = None
        if isinstance(answer, Reign):
            return answer
        assert time.monotonic() < deadline, f"not won within {bound_s} s: {answer}"
        await asyncio.sleep(0.1)


async def test_a_reign_ends_with_its_lease(connect, one_etcd, cluster):
    first = await connect(one_etcd.url, cluster=cluster, lease_ttl_s=2, timeout_s=1.0)
    second = await connect(one_etcd.url, cluster=cluster, timeout_s=1.0)
    old = await led(first)
    with pytest.raises(AssertionError):
        await led(second, bound_s=0.5)
    assert (await led(second)).leader.term == 2
    for call in (first.commit(old, [Write("nodes/a", {})]), first.renew(old)):
        with pytest.raises(Conflict) as caught:
            await call
        assert caught.value.reason == "LEADERSHIP_LOST"
    assert await second.read_all() == {}


async def test_a_leader_key_that_was_deleted_ends_the_reign(connect, one_etcd, cluster):
    store = await connect(one_etcd.url, cluster=cluster)
    reign = await led(store)
    one_etcd.etcdctl("del", f"/resilver/{cluster}/leader")
    with pytest.raises(Conflict):
        await store.renew(reign)
    with pytest.raises(Conflict):
        await store.commit(reign, [])


async def test_keys_and_values_are_for_people_too(connect, one_etcd, cluster):
    store = await connect(one_etcd.url, cluster=cluster)
    reign = await led(store)
    await store.commit(reign, [Write("volumes/vm1", {"epoch": 3})])
    lines = one_etcd.etcdctl("get", "--prefix", f"/resilver/{cluster}/").splitlines()
    found = {
        key.removeprefix(f"/resilver/{cluster}/"): json.loads(value)
        for key, value in zip(*[iter(lines)] * 2, strict=True)
    }
    assert set(found) == {"leader", "store_id", "term", "volumes/vm1"}
    assert found["term"] == {"term": 1}
    assert found["leader"]["name"] == "c1"
    assert found["volumes/vm1"] == {"epoch": 3}


async def test_clusters_do_not_see_each_other(connect, one_etcd, cluster):
    one = await connect(one_etcd.url, cluster=cluster)
    longer = await connect(one_etcd.url, cluster=f"{cluster}0")
    await one.commit(await led(one), [Write("nodes/a", {})])
    await longer.commit(await led(longer), [Write("nodes/b", {})])
    assert set(await one.read_all()) == {"nodes/a"}
    assert set(await longer.read_all()) == {"nodes/b"}
    assert await one.open() != await longer.open()


async def test_a_record_that_is_not_ours_is_named(connect, one_etcd, cluster):
    store = await connect(one_etcd.url, cluster=cluster)
    one_etcd.etcdctl("put", f"/resilver/{cluster}/volumes/vm1", "[1]")
    with pytest.raises(Damaged, match="volumes/vm1") as caught:
        await store.read_all()
    assert caught.value.metadata["key"] == "volumes/vm1"
    one_etcd.etcdctl("put", f"/resilver/{cluster}/term", "many")
    with pytest.raises(Damaged, match="term"):
        await store.campaign("c1", "c1:1")


async def test_an_emptied_store_is_not_led(connect, one_etcd, cluster):
    store = await connect(one_etcd.url, cluster=cluster)
    reign = await led(store)
    one_etcd.etcdctl("del", "--prefix", f"/resilver/{cluster}/")
    with pytest.raises(Conflict):
        await store.commit(reign, [Write("nodes/a", {})])
    with pytest.raises(Unavailable, match="emptied or replaced"):
        await store.campaign("c1", "c1:1")


async def test_reading_survives_a_compaction_between_two_pages(connect, one_etcd, cluster, monkeypatch):
    monkeypatch.setattr(adapter, "PAGE_RECORDS", 2)
    store = await connect(one_etcd.url, cluster=cluster)
    reign = await led(store)
    await store.commit(reign, [Write(f"nodes/{index}", {}) for index in range(5)])
    call, pages = store._members.call, 0

    async def compacting(ask):
        nonlocal pages
        pages += 1
        if pages == 2:
            revision = await store.commit(reign, [Write("nodes/0", {})])
            await asyncio.to_thread(one_etcd.etcdctl, "compact", str(revision))
        return await call(ask)

    monkeypatch.setattr(store._members, "call", compacting)
    assert len(await store.read_all()) == 5
    assert pages > 4


async def test_a_dead_member_is_one_hiccup(connect, three_members):
    """Writes go on through the death of the leading member; one that was under way may cost the reign, no more."""
    store = await connect(three_members.url)
    reign = await led(store)
    killing = asyncio.get_running_loop().run_in_executor(None, three_members.kill, three_members.leading())
    begun = time.monotonic()
    written = 0
    while written < 60 or not killing.done():
        try:
            await store.commit(reign, [Write("nodes/a", {"n": written + 1})])
            written += 1
        except (Conflict, Unavailable):
            reign = await led(store)
        assert time.monotonic() - begun < BOUND_S
    await killing
    assert (await store.read_all())["nodes/a"].value["n"] in {written, written + 1}
    health = await store.health()
    assert (health.healthy_count, health.member_count) == (2, 3)


async def test_a_hung_member_is_one_hiccup(connect, three_members):
    store = await connect(three_members.url)
    reign = await led(store)
    for index in range(3):
        three_members.stop(index)
        begun = time.monotonic()
        for number in range(5):
            try:
                reign = await store.renew(reign)
                await store.commit(reign, [Write("nodes/a", {"n": [index, number]})])
            except (Conflict, Unavailable):
                reign = await led(store)
        assert len(await store.read_all()) <= 1
        assert (await store.health()).healthy_count == 2
        assert time.monotonic() - begun < 2 * BOUND_S
        three_members.go_on(index)
        await asyncio.to_thread(three_members.wait, index)


async def test_a_store_that_is_down_is_said_so_in_time(connect, one_etcd_of_its_own):
    store = await connect(one_etcd_of_its_own.url, timeout_s=1.0)
    reign = await led(store)
    one_etcd_of_its_own.kill(0)
    calls = {
        "open": store.open,
        "campaign": lambda: store.campaign("c1", "c1:1"),
        "leader": store.leader,
        "renew": lambda: store.renew(reign),
        "read_all": store.read_all,
        "resign": lambda: store.resign(reign),
    }
    for name, call in calls.items():
        begun = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await call()
        assert caught.value.reason == "STORE_UNAVAILABLE", name
        assert "127.0.0.1" in caught.value.message
        assert time.monotonic() - begun < 30, name
    with pytest.raises(Unavailable):
        await store.commit(reign, [Write("nodes/a", {})])
    assert (await store.health()).healthy_count == 0


async def test_a_commit_without_an_answer_ends_the_reign(connect, one_etcd_of_its_own):
    store = await connect(one_etcd_of_its_own.url, timeout_s=1.0)
    old = await led(store)
    one_etcd_of_its_own.stop(0)
    begun = time.monotonic()
    with pytest.raises(Conflict, match="not known whether") as caught:
        await store.commit(old, [Write("nodes/a", {"by": "old"})])
    assert caught.value.reason == "LEADERSHIP_LOST"
    assert time.monotonic() - begun < 30
    one_etcd_of_its_own.go_on(0)
    await asyncio.to_thread(one_etcd_of_its_own.wait, 0)
    new = await led(store)
    assert new.leader.term == 2
    # Carried out before the new reign began, or never.
    before = await store.read_all()
    with pytest.raises(Conflict):
        await store.commit(old, [Write("nodes/a", {"by": "old, late"})])
    assert await store.read_all() == before


async def test_users_and_tokens(connect, one_etcd_of_its_own, tmp_path):
    etcd = one_etcd_of_its_own
    for arguments in (["user", "add", "root:secret"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        etcd.etcdctl(*arguments)
    password = tmp_path / "password"
    password.write_text("secret\n")
    store = await connect(etcd.url, username="root", password_file=str(password))
    reign = await led(store)
    # A member that starts again has forgotten all tokens.
    etcd.kill(0)
    etcd.start(0)
    deadline = time.monotonic() + BOUND_S
    while (await store.health()).healthy_count == 0:
        assert time.monotonic() < deadline
    reign = await store.renew(reign)
    await store.commit(reign, [Write("nodes/a", {})])
    password.write_text("wrong")
    with pytest.raises(Unavailable, match="authentication failed"):
        await connect(etcd.url, username="root", password_file=str(password))
    with pytest.raises(Unavailable, match="user"):
        await connect(etcd.url)


async def test_a_certificate_that_is_not_there():
    store = open_store(config_of("etcd://127.0.0.1:1", ca="/nowhere/ca.pem"))
    with pytest.raises(Invalid, match="No such file") as caught:
        await store.open()
    assert caught.value.metadata["field"] == "etcd.ca"
    await store.close()
