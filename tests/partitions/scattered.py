"""A cluster whose parts are on machines of their own: three members of etcd, two coordinators, three agents.

Everything is that of `tests/cluster.py`; commands are given on the machine `op`, which nothing cuts off.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from resilver.v1 import coordinator_pb2 as api
from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster
from tests.cluster import wait_for as wait_for_it
from tests.partitions.net import Console, Network, network

MEMBERS = ("e1", "e2", "e3")
COORDINATORS = ("c1", "c2")
NODES = ("a", "b", "c")
OPERATOR = "op"
VOLUME = "vm1"
SECOND = "vm2"
"""On `a` and `b` alone, elected and never copied."""
IMAGE_BYTES = 64 * MIB
DATA_BYTES = 24 * MIB
SECOND_BYTES = 8 * MIB
LEASE_TTL_S = 10.0
NOTICED_S = 10.0
"""In how much time whoever hangs, or cannot be reached, is known to be away."""
SETTLED_S = 90.0
INSECURE = "insecure = true\n"
LOG_CHARS = 4000
_ESTABLISHED = "01"

wait_for = partial(wait_for_it, every_s=0.25)
"""What is waited for here takes seconds; to ask for it costs a core some milliseconds."""


@dataclass
class Scattered(Cluster):
    net: Network = field(kw_only=True)
    consoles: dict[str, Console] = field(default_factory=dict)

    def host(self, name: str) -> str:
        return self.net.addresses[name]

    def within(self, name: str, command: list[str]) -> list[str]:
        return self.net.machines[name or OPERATOR].command(*command)

    def console(self, name: str) -> str:
        if name not in self.consoles:
            self.consoles[name] = Console(self.net.machines[name], (self.host(name), self.ports[name]))
        return self.consoles[name].target

    def start(self, disk: Path, *, members: tuple[str, ...] = MEMBERS, keep_last: int = 16) -> None:
        """All of it, with the volume in sync on all nodes; `disk` is a file system that shares extents."""
        for name in members:
            self._start_member(name, members)
        self.etcd_url = "etcd://" + ",".join(f"{self.host(name)}:2379" for name in members)
        for name in COORDINATORS:
            self.start_coordinator(name, INSECURE)
        images.make(disk / "a" / "vm1.img", IMAGE_BYTES, DATA_BYTES, seed=1)
        images.make(disk / "a" / f"{SECOND}.img", SECOND_BYTES, SECOND_BYTES, seed=2)
        for node in NODES:
            (disk / node).mkdir(exist_ok=True)
            names = (VOLUME, SECOND) if node != "c" else (VOLUME,)
            volumes = {name: disk / node / f"{name}.img" for name in names}
            self.start_agent(node, volumes, INSECURE, f"keep_last = {keep_last}")
        self.wait_reachable(VOLUME, *NODES)
        self.wait_reachable(SECOND, "a", "b")
        self.ok("elect", SECOND)
        self.ok("resync", VOLUME)

    def _start_member(self, name: str, members: tuple[str, ...]) -> None:
        mine = f"http://{self.host(name)}"
        self.process(
            name, "etcd", "--name", name, "--data-dir", str(self.directory / name),
            "--listen-client-urls", f"{mine}:2379", "--advertise-client-urls", f"{mine}:2379",
            "--listen-peer-urls", f"{mine}:2380", "--initial-advertise-peer-urls", f"{mine}:2380",
            "--initial-cluster", ",".join(f"{one}=http://{self.host(one)}:2380" for one in members),
            # A member that comes back must not depose who leads the others: what newer ones do by themselves.
            "--pre-vote", "--heartbeat-interval=250", "--election-timeout=1500", "--unsafe-no-fsync",
            "--logger", "zap", "--log-level", "warn",
        )  # fmt: skip

    def close(self) -> None:
        super().close()
        for console in self.consoles.values():
            console.close()

    def connections(self, target: str, source: str) -> set[str]:
        """The connections of a target to a source's block stream, as the target's kernel has them, by their ports."""
        port = f":{self.ports[source + '-stream']:04X}"
        rows = [line.split() for line in self.net.machines[target].run("cat", "/proc/net/tcp").splitlines()[1:]]
        return {row[1] for row in rows if row[2].endswith(port) and row[3] == _ESTABLISHED}

    # Who leads.

    def leading(self, name: str) -> bool:
        """Whether that coordinator answers as the leader, asked at its own console."""
        with contextlib.suppress(grpc.RpcError):
            self.ask_one(name, "ListNodes", api.ListNodesRequest())
            return True
        return False

    def leader(self) -> str:
        """The one that leads, once there is one."""
        return str(wait_for(lambda: next(filter(self.leading, COORDINATORS), ""), "somebody leads"))

    def refusal(self, name: str) -> str:
        """What a coordinator says that does not lead, empty if it does."""
        try:
            self.ask_one(name, "ListNodes", api.ListNodesRequest())
        except grpc.RpcError as error:
            return str(error.details())  # type: ignore[attr-defined]  # every error of a call is a grpc.Call
        return ""

    def said(self, name: str, event: str, since: int = 0) -> list[dict[str, Any]]:
        """The lines of that event in a process's log, of those after the first `since` bytes."""
        lines = self.log(name)[since:].splitlines()
        found = (json.loads(line) for line in lines if line.startswith("{") and f'"{event}"' in line)
        return [line for line in found if line.get("event") == event]

    def errors(self) -> list[str]:
        """What coordinators and agents have logged as errors: whatever befalls a network is none of theirs."""
        lines = (line for name in (*COORDINATORS, *NODES) for line in self.log(name).splitlines())
        return [line for line in lines if '"level": "error"' in line or line.startswith("Traceback")]

    def tell_logs(self) -> None:
        """Shows the end of each process's log beside a test that failed."""
        for name in self.processes:
            sys.stdout.write(f"--- the end of {name}'s log\n{self.log(name)[-LOG_CHARS:]}\n")

    # The volume.

    @property
    def epoch(self) -> tuple[int, str]:
        shown = wait_for(lambda: self.volume(VOLUME), "the volume is shown")
        return shown["epoch"], shown["epoch_id"]

    def term(self) -> int:
        return int(wait_for(lambda: self.ask("GetCluster", api.GetClusterRequest()), "somebody answers").term)

    def elections(self) -> list[Any]:
        answer = wait_for(
            lambda: self.ask("ListElections", api.ListElectionsRequest(volume=VOLUME)), "elections are told"
        )
        return list(answer.elections)

    def settle(self) -> None:
        """Waits until all is as it was in the beginning: one leader, all nodes there and in sync, all bytes equal."""
        self.net.heal()
        self.leader()
        self.wait_reachable(VOLUME, *NODES)
        wait_for(self.in_sync, "all are in sync", SETTLED_S)

    def in_sync(self) -> bool:
        rows = self.replicas(VOLUME)
        there = all(rows.get(node, {}).get("reachable") and rows[node]["state"] == "IN_SYNC" for node in NODES)
        return there and len({rows[node]["snapshot"] for node in NODES}) == 1

    def all_identical(self) -> bool:
        one, *others = (self.image(node, VOLUME) for node in NODES)
        return all(identical(one, other) for other in others)

    def write(self, seed: int, node: str = "a") -> None:
        """New bytes in all that the volume holds."""
        images.make(self.image(node, VOLUME), IMAGE_BYTES, DATA_BYTES, seed)


class Transfer:
    """A resync that has begun and is not over: it is taken so slowly that there is time for things to happen."""

    def __init__(self, made: Scattered, node: str, *, bytes_s: int, at_least_bytes: int = 2 * MIB) -> None:
        self.made, self.node = made, node
        self.journal = made.records(node, VOLUME) / "stage" / "journal.bin"
        made.net.slow(node, bytes_s)
        self.came_before = made.net.came_to(node)
        (started,) = made.ok("resync", VOLUME, "--to", node, "--no-wait")["resyncs"]
        self.id: str = started["id"]
        self.target: str = started["plan"]["target"]
        wait_for(lambda: self.done_bytes() >= at_least_bytes, "a part is there", every_s=0.05)

    @property
    def came_bytes(self) -> int:
        """What has gone over the wire to the target since it was ordered, whatever for."""
        return self.made.net.came_to(self.node) - self.came_before

    def shown(self) -> Any:
        """The resync as the coordinator shows it; empty while none knows it."""
        return next((run for run in self.made.resyncs(VOLUME) if run["id"] == self.id), {})

    def done_bytes(self) -> int:
        return int(self.shown().get("done_bytes") or 0)

    def from_each(self) -> dict[str, int]:
        """What has come from each source that has sent anything."""
        sources = self.shown().get("sources", ())
        return {source["node"]: source["wire_bytes"] for source in sources if source["wire_bytes"]}

    def left(self) -> set[str]:
        """The sources that the target has left so far in this run."""
        told = self.made.said(self.node, "stream.source_left")
        return {str(line["source"]) for line in told if line.get("resync") == self.id}

    def stalled(self) -> bool:
        """Whether nothing has come for as long as a source may be silent."""
        done, until = self.done_bytes(), time.monotonic() + NOTICED_S
        while self.done_bytes() == done:
            if time.monotonic() > until:
                return True
            time.sleep(0.5)  # of another process's progress there is no event
        return False

    def on_disk(self) -> bool:
        """Whether the target has become its tip, as the disk says: no daemon is asked."""
        return self.made.snapshot_data(self.node, VOLUME, self.target).exists() and not self.journal.exists()

    def succeeds(self) -> Any:
        """The resync, once the coordinator shows that it has ended, which must be well."""
        self.made.net.fast(self.node)
        run = wait_for(lambda: self.shown() if self.shown().get("end_time") else None, f"{self.node} has it", SETTLED_S)
        assert run["state"] == "SUCCEEDED", run
        assert run["done_bytes"] == run["total_bytes"]
        return run


@contextlib.contextmanager
def scattered(directory: Path, disk: Path) -> Iterator[Scattered]:
    """A cluster in sync; it and its network are gone at the end of the block, whatever happens in it."""
    with network((*MEMBERS, *COORDINATORS, *NODES, OPERATOR)) as net:
        made = Scattered(directory, net=net)
        try:
            try:
                made.start(disk)
            except BaseException:
                made.tell_logs()
                raise
            yield made
        finally:
            made.close()
