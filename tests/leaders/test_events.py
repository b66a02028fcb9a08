"""`resilver events --follow` through the deaths of leaders: what it shows is what `events` shows, each event once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from resilver.v1 import coordinator_pb2 as api
from tests import etcd
from tests.acceptance import images
from tests.acceptance.images import BLOCK, MIB
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted, needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]

NODES = ("a", "b")
COORDINATORS = ("c1", "c2")
VOLUMES = ("vm1", "vm2")
LEASE_TTL_S = 3
KILLS = 12 if os.environ.get("RESILVER_THOROUGH") else 3


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    """Two coordinators with short leases, and two nodes of which one has data."""
    with etcd.running(tmp_path) as store, mounted("xfs") as disk, cluster(tmp_path) as made:
        made.etcd_url, made.lease_ttl_s = store.url, LEASE_TTL_S
        for name in COORDINATORS:
            made.start_coordinator(name)
        for volume in VOLUMES:
            images.make(disk / "a" / f"{volume}.img", 4 * MIB, MIB, seed=1)
        (disk / "b").mkdir()
        for node in NODES:
            made.start_agent(node, {volume: disk / node / f"{volume}.img" for volume in VOLUMES})
        made.wait_reachable("vm1", *NODES)
        yield made


class Follower:
    """An operator's `events --follow`, as a process; what it shows goes to a file."""

    def __init__(self, made: Cluster, name: str) -> None:
        self._shown, self._said = made.directory / f"{name}.out", made.directory / f"{name}.err"
        ports = ",".join(f"127.0.0.1:{made.ports[one]}" for one in COORDINATORS)
        command = [
            sys.executable,
            "-m",
            "resilver.cli.main",
            "--coordinator",
            ports,
            "events",
            "--follow",
            "-o",
            "json",
        ]
        with self._shown.open("wb") as out, self._said.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)

    def shown(self) -> list[dict[str, Any]]:
        lines = self._shown.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def has(self, sequence: int) -> bool:
        return any(event["sequence"] >= sequence for event in self.shown()[-1:])

    @property
    def said(self) -> str:
        return self._said.read_text()


class Operators:
    """They ask for consistency points of vm1, elections of vm2 and resyncs of both, as fast as they are answered."""

    def __init__(self, made: Cluster) -> None:
        self.acknowledged: list[str] = []
        self._made = made
        self._done = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._points, self._others)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _points(self) -> None:
        made = Cluster(self._made.directory, ports=self._made.ports)  # channels of its own
        while not self._done.wait(0.05):
            answer = made.ask("CreateSnapshot", api.CreateSnapshotRequest(request_id=new_id(), volumes=["vm1"]))
            self.acknowledged += [one.cp.text for one in answer.snapshots] if answer else []
        made.close()

    def _others(self) -> None:
        made = Cluster(self._made.directory, ports=self._made.ports)
        chance = random.Random(1)
        while not self._done.wait(0.05):
            made.ask(
                "ElectPrimary", api.ElectPrimaryRequest(request_id=new_id(), volume="vm2", accept_loss_nodes=["b"])
            )
            for volume in VOLUMES:
                images.write(self._made.image("a", volume), [chance.randrange(1024) * BLOCK], chance.randrange(99))
            made.ask("StartResync", api.StartResyncRequest(request_id=new_id(), all=True))
        made.close()


def new_id() -> str:
    return str(uuid.uuid4())


def kill_the_leader(made: Cluster, follower: Follower, operators: Operators, after_s: float) -> str:
    """In the middle of whatever is under way, once something has happened in its reign."""
    leader = str(wait_for(made.leader, "somebody leads"))
    shown, points = len(follower.shown()), len(operators.acknowledged)

    def happening() -> bool:
        return len(follower.shown()) > shown + 3 and len(operators.acknowledged) > points

    wait_for(happening, "things happen", every_s=0.02)
    threading.Event().wait(after_s)
    made.processes[leader].kill()
    return leader


def test_a_follower_sees_each_event_once_whichever_leader_dies(two: Cluster) -> None:
    chance = random.Random(20)
    with Follower(two, "first") as first:
        two.ok("resync", "--all")
        with Operators(two) as operators:
            dead = kill_the_leader(two, first, operators, chance.random() * 0.3)
            with Follower(two, "second") as second:  # which begins while nobody leads
                for _ in range(KILLS - 1):
                    wait_for(lambda dead=dead: two.leader() not in ("", dead), "the other one leads")
                    two.restart(dead)
                    dead = kill_the_leader(two, first, operators, chance.random() * 0.3)
                before = first.shown()[-1]["sequence"]
                wait_for(lambda: first.has(before + 5), "things happen again")
                operators.__exit__()
                for volume in VOLUMES:
                    wait_for(lambda volume=volume: all(run["end_time"] for run in two.resyncs(volume)), "all is done")
                events: list[dict[str, Any]] = two.ok("events")["events"]
                for follower in (first, second):
                    last = events[-1]["sequence"]
                    wait_for(lambda follower=follower, last=last: follower.has(last), "the last one is shown")
                    assert [one for one in follower.shown() if one["sequence"] <= last] == events, follower.said
                    assert "lost" not in follower.said
    check(two, events, operators.acknowledged)


def check(made: Cluster, events: list[dict[str, Any]], acknowledged: list[str]) -> None:
    """The list is whole, and tells of everything that the store holds, once."""
    assert [event["previous_sequence"] for event in events] == [0, *(event["sequence"] for event in events[:-1])]
    assert len({event["sequence"] >> 32 for event in events}) == KILLS + 1, "each leader told something"
    told = Counter((event["type"], event["resync"]) for event in events)
    for volume in VOLUMES:
        for run in made.resyncs(volume):
            assert told["RESYNC_STARTED", run["id"]] == 1, run
            assert told[f"RESYNC_{run['state']}", run["id"]] == 1, run
    types = Counter(event["type"] for event in events)
    refused = [event for event in events if (event["type"], event["volume"]) == ("ELECTION_REFUSED", "vm2")]
    assert {"ELECTED", "ELECTION_REFUSED", "CONSISTENCY_POINT", "RESYNC_SUCCEEDED"} <= types.keys(), types
    points = Counter(event["message"] for event in events if event["type"] == "CONSISTENCY_POINT")
    assert acknowledged
    assert set(points.values()) == {1}, "each is recorded, and told of, once"
    assert {f"vm1 is at {cp} on a" for cp in acknowledged} <= points.keys()
    refusals = [one for one in made.ok("history", "vm2")["history"] if one["refusal"] is not None]
    assert len(refused) == len(refusals)
