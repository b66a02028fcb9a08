"""What only a file can do to us: wrong kinds, other owners, full disks, processes that die in the middle."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from coordinator.store import open_store, sqlite
from coordinator.store.base import Leader, Reign, Write
from resilver.errors import Conflict, Invalid, Unavailable
from tests.coordinator.store.conftest import config_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "var" / "store.db"


@pytest.fixture
def url(path):
    return f"sqlite://{path}"


async def refused(url, **keys) -> Invalid:
    store = open_store(config_of(url, **keys))
    with pytest.raises(Invalid) as caught:
        await store.open()
    await store.close()
    assert caught.value.metadata["field"] == "store"
    return caught.value


async def test_what_cannot_be_a_store(tmp_path, connect):
    assert "is a directory" in (await refused(f"sqlite://{tmp_path}")).message
    text = tmp_path / "text"
    text.write_text("hello, this is a text and not a database of any kind\n" * 20)
    assert "is no Resilver store" in (await refused(f"sqlite://{text}")).message
    assert "cannot be made: Not a directory" in (await refused(f"sqlite://{text}/x/store.db")).message
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mail (id)")
    database.close()
    assert "another program" in (await refused(f"sqlite://{other}")).message
    await connect(f"sqlite://{tmp_path}/ours.db", cluster="prod")
    assert "belongs to cluster 'prod'" in (await refused(f"sqlite://{tmp_path}/ours.db", cluster="test")).message


async def test_it_is_for_its_owner_alone(connect, url, path):
    store = await connect(url)
    await store.campaign("c1", "c1:1")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


async def test_to_open_again_is_allowed(connect, url):
    store = await connect(url)
    reign = await store.campaign("c1", "c1:1")
    await store.open()
    await store.commit(reign, [Write("nodes/a", {})])


@pytest.mark.parametrize("name", ["store.db", "store.db.lock"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_file_that_is_not_the_one_opened_ends_the_reign(connect, url, path, name, how):
    store = await connect(url)
    reign = await store.campaign("c1", "c1:1")
    file = path.with_name(name)
    data = file.read_bytes()
    file.rename(file.with_suffix(".old"))
    if how == "replaced":
        file.write_bytes(data)
    for call in (store.renew(reign), store.commit(reign, [Write("nodes/a", {})])):
        with pytest.raises(Conflict) as caught:
            await call
        assert caught.value.reason == "LEADERSHIP_LOST"
    if name == "store.db":
        assert (await store.health()).healthy_count == 0
        with pytest.raises(Unavailable):
            await store.campaign("c1", "c1:1")
    else:
        assert (await store.campaign("c1", "c1:1")).leader.term == 2


HOLDER = """
import asyncio, sys
from coordinator.store import open_store
from coordinator.store.base import Write
from resilver.config import CoordinatorConfig

async def main():
    store = open_store(CoordinatorConfig(cluster="demo", name="c0", store=sys.argv[1]))
    await store.open()
    reign = await store.campaign("c0", "c0:1")
    number = 0
    while True:
        number += 1
        await store.commit(reign, [Write(f"nodes/{name}", {"n": number, "pad": "x" * 3000}) for name in "abcdef"])
        if number == 3:
            print("ready", flush=True)

asyncio.run(main())
"""


async def test_a_leader_that_is_killed_leaves_whole_commits_and_a_free_lock(connect, url):
    store = await connect(url)
    last = 0
    for round_ in range(4):
        command = [sys.executable, "-c", HOLDER, url]
        child = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
        try:
            assert await asyncio.to_thread(child.stdout.readline) == b"ready\n"
            leader = await store.campaign("c1", "c1:1")
            assert isinstance(leader, Leader)
            assert (leader.name, leader.term) == ("c0", 2 * round_ + 1)
            assert await store.leader() == leader
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        assert await store.leader() is None
        reign = await store.campaign("c1", "c1:1")
        assert isinstance(reign, Reign)
        numbers = {record.value["n"] for record in (await store.read_all()).values()}
        assert len(numbers) == 1
        assert numbers.pop() >= 3
        await store.resign(reign)
        assert reign.leader.term > last
        last = reign.leader.term


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system, which only root may")
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


async def test_a_full_disk_changes_nothing(small_disk):
    store = open_store(config_of(f"sqlite://{small_disk}/store.db"))
    await store.open()
    try:
        reign = await store.campaign("c1", "c1:1")
        await store.commit(reign, [Write("nodes/a", {"v": 1})])

        async def fill():
            for index in range(100):
                await store.commit(reign, [Write("nodes/a", {"v": 1}), Write(f"nodes/{index}", {"pad": "x" * 30_000})])

        with pytest.raises(Unavailable, match="full"):
            await fill()
        before = await store.read_all()
        assert before["nodes/a"].value == {"v": 1}
        # Room is made, and the same reign goes on.
        grow = ["mount", "-o", "remount,size=1m", small_disk]
        await asyncio.to_thread(subprocess.run, grow, check=True)
        reign = await store.renew(reign)
        await store.commit(reign, [Write("nodes/a", {"v": 2})])
        assert (await store.read_all())["nodes/a"].value == {"v": 2}
    finally:
        await store.close()


async def test_a_disk_that_hangs_ends_the_reign_in_time(connect, url, monkeypatch):
    monkeypatch.setattr(sqlite, "TIMEOUT_S", 0.3)
    store = await connect(url)
    reign = await store.campaign("c1", "c1:1")
    go_on = threading.Event()
    store._thread.submit(go_on.wait)
    begun = time.monotonic()
    with pytest.raises(Conflict, match="hangs"):
        await store.commit(reign, [Write("nodes/a", {})])
    with pytest.raises(Unavailable, match="hangs"):
        await store.renew(reign)
    assert time.monotonic() - begun < 30
    go_on.set()
    monkeypatch.setattr(sqlite, "TIMEOUT_S", 10)
    # What was under way comes before the next reign, never into it.
    assert (await store.campaign("c1", "c1:1")).leader.term == 2
    assert set(await store.read_all()) == {"nodes/a"}
