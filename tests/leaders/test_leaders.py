"""Leaders that are stopped past their lease, and a store that loses members, in real processes.

What no fault here may do: open an epoch, lose a consistency point that was acknowledged, or let an order of a deposed
leader, or a write of one, take effect.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Self

import grpc
import pytest

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests import etcd
from tests.acceptance import images
from tests.acceptance.images import MIB
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted, needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]

NODES = ("a", "b")
COORDINATORS = ("c1", "c2")
VOLUMES = ("vm1", "vm2", "vm3")
LEASE_TTL_S = 3
STOPS = 20 if os.environ.get("RESILVER_THOROUGH") else 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[etcd.Etcd]:
    with etcd.running(tmp_path_factory.mktemp("etcd"), 3) as members:
        yield members


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, store: etcd.Etcd) -> Iterator[Cluster]:
    """Two coordinators with short leases, two nodes in sync, and a store of three members."""
    with mounted("xfs", 2 << 30) as disk, cluster(tmp_path_factory.mktemp("leaders")) as made:
        made.etcd_url, made.lease_ttl_s = store.url, LEASE_TTL_S
        for name in COORDINATORS:
            made.start_coordinator(name)
        for node in NODES:
            (disk / node).mkdir()
        for volume in VOLUMES:
            images.make(disk / "a" / f"{volume}.img", 4 * MIB, MIB, seed=1)
        for node in NODES:
            paths = {volume: disk / node / f"{volume}.img" for volume in VOLUMES}
            made.start_agent(node, paths, volume_extra="keep_last = 10000")
        made.wait_reachable("vm1", *NODES)
        made.ok("resync", "--all")
        yield made


class Asking:
    """An operator that asks one coordinator for consistency points of all volumes, as fast as it answers."""

    def __init__(self, made: Cluster, name: str) -> None:
        self.acknowledged: list[str] = []
        self._done = threading.Event()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{made.ports[name]}")
        self._threads = [threading.Thread(target=self._ask, args=(volume,), daemon=True) for volume in VOLUMES]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._channel.close()  # ends what still waits for an answer
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _ask(self, volume: str) -> None:
        stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)
        while not self._done.is_set():
            request = api.CreateSnapshotRequest(request_id=str(uuid.uuid4()), volumes=[volume])
            try:
                answer = stub.CreateSnapshot(request, timeout=60.0)
            except (grpc.RpcError, ValueError):  # stopped, deposed, or closed here
                self._done.wait(0.05)
                continue
            self.acknowledged += [one.id for one in answer.snapshots]


def other(name: str) -> str:
    return next(one for one in COORDINATORS if one != name)


def point(made: Cluster, volume: str) -> str:
    """The id of a consistency point that the leader has acknowledged, as soon as there is one that acknowledges."""

    def taken() -> str:
        answer = made.ask("CreateSnapshot", api.CreateSnapshotRequest(volumes=[volume]))
        return answer.snapshots[0].id if answer and answer.snapshots else ""

    return str(wait_for(taken, f"a consistency point of {volume}"))


def on_disk(made: Cluster) -> dict[str, frozenset[str]]:
    """What each replica's directory of snapshots holds."""
    return {
        f"{volume}/{node}": frozenset(
            entry.name for entry in made.records(node, volume).iterdir() if (entry / "record.json").exists()
        )
        for volume in VOLUMES
        for node in NODES
    }


def epochs(made: Cluster) -> dict[str, int]:
    return {volume: made.volume(volume)["epoch"] for volume in VOLUMES}


def stored(store: etcd.Etcd) -> str:
    """Every key and value of the cluster, with the revisions at which they were written."""
    return store.etcdctl("get", "--prefix", "/resilver/test/", "--write-out=json", "--keys-only=false").split(
        '"kvs"', 1
    )[-1]


def test_a_leader_that_was_stopped_past_its_lease_does_nothing_more(two: Cluster, store: etcd.Etcd) -> None:
    chance, before = random.Random(11), epochs(two)
    for _ in range(STOPS):
        stopped_and_continued(two, store, wait_for(two.leader, "somebody leads"), chance)
    assert epochs(two) == before


def stopped_and_continued(two: Cluster, store: etcd.Etcd, old: str, chance: random.Random) -> None:
    """A leader is stopped in the middle of its work, and goes on once another one has done some."""
    with Asking(two, old) as asking:
        wait_for(lambda: len(asking.acknowledged) > len(VOLUMES), "points are taken")
        time.sleep(chance.uniform(0.0, 0.1))  # the moment is what this is about
        two.processes[old].send(signal.SIGSTOP)
        wait_for(lambda: two.leader() == other(old), f"{other(old)} leads")
        for volume in VOLUMES:  # tells every agent the new term
            point(two, volume)
            two.wait_reachable(volume, *NODES)
        two.ok("resync", "--all")
        wait_for(lambda: not any(run["end_time"] is None for run in two.resyncs("")), "no resync runs")
        data, records = on_disk(two), stored(store)
        two.processes[old].send(signal.SIGCONT)
        wait_for(lambda: deposed(two, old), f"{old} names who leads")
    assert on_disk(two) == data
    assert stored(store) == records
    assert all(any(one in held for held in data.values()) for one in asking.acknowledged)


def deposed(made: Cluster, name: str) -> bool:
    """Whether this coordinator answers that another one leads."""
    with grpc.insecure_channel(f"127.0.0.1:{made.ports[name]}") as channel:
        try:
            coordinator_pb2_grpc.CoordinatorStub(channel).GetCluster(api.GetClusterRequest(), timeout=5.0)
        except grpc.RpcError as error:
            return f"127.0.0.1:{made.ports[other(name)]}" in str(error)
    return False


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_each_member_of_the_store_in_turn(two: Cluster, store: etcd.Etcd, how: str) -> None:
    before, taken = epochs(two), []
    for index in range(len(store.members)):
        with away(store, [index], how):
            taken += [(volume, point(two, volume)) for volume in VOLUMES]
        taken += [(volume, point(two, volume)) for volume in VOLUMES]
    assert epochs(two) == before
    assert all(one in on_disk(two)[f"{volume}/a"] for volume, one in taken)
    for volume in VOLUMES:  # the lead may have passed on with the last of them, and a node may not have found it yet
        two.wait_reachable(volume, *NODES)
    two.ok("resync", "--all")


@pytest.mark.parametrize("how", ["killed", "hung"])
@pytest.mark.parametrize("away_s", [pytest.param(5.0, id="shortly"), pytest.param(60.0, id="a-minute")])
def test_the_whole_store_is_away(two: Cluster, store: etcd.Etcd, how: str, away_s: float) -> None:
    """Nobody leads; the agents stay up, nothing is elected, and afterwards all goes on as it was."""
    before, last = epochs(two), point(two, "vm1")
    images.write(two.image("a", "vm1"), [0, 8 * images.BLOCK], seed=int(away_s))
    with away(store, range(len(store.members)), how):
        wait_for(lambda: not two.leader(), "nobody leads")
        time.sleep(away_s)  # how long it is away is what this is about
        assert not two.leader()
        assert two.cli("snapshot", "vm1", "--timeout", "2").code == 4
    assert point(two, "vm1") != last
    two.wait_reachable("vm1", *NODES)
    assert epochs(two) == before
    two.ok("resync", "--all")
    assert images.identical(two.image("a", "vm1"), two.image("b", "vm1"))


@contextlib.contextmanager
def away(store: etcd.Etcd, which: Iterable[int], how: str) -> Iterator[None]:
    """Members of the store that are killed, or stopped, for as long as the block lasts."""
    leave, come = (store.kill, store.start) if how == "killed" else (store.stop, store.go_on)
    for index in which:
        leave(index)
    try:
        yield
    finally:
        for index in which:
            come(index)
        for index in which:
            store.wait(index)
