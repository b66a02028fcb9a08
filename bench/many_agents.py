"""A large cluster on this machine: simulated agents against one real coordinator and a real etcd.

    .venv/bin/python bench/many_agents.py [--agents 10 100 1000] [--volumes 10] [--json FILE]

The agents are `tests/crowd.py`, in a process of its own: a real connection and stream each, real reports, no disks. Of
every tenth volume one replica is stale. Measured for each size: how long a coordinator takes from its start until all
replicas are reported, with an empty store and with a full one; `status` (every page of ListVolumes, as the command asks
for it) in a quiet cluster and while CPs are taken; the whole command; a plan of all volumes; the coordinator's CPU and
memory; and how often it wrote to etcd. Absolute times are of this machine; what to look at is what grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc, volume_pb2
from tests.cluster import Cluster, cluster, wait_for
from tests.crowd import Shape

MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")
QUIET_S = 20.0
STATUS_CALLS = 100
PLANS = 3
COMMANDS = 1
POINT_EVERY_S = 300
"""How often each volume takes a CP while the cluster is busy."""


@dataclass
class Found:
    """What one size showed. Times in seconds, memory in MiB; `_cpu` is of one core."""

    agents: int
    volumes: int = 0
    replicas: int = 0
    first_reported_s: float = 0.0
    first_writes: int = 0
    reported_s: float = 0.0
    reported_cpu_s: float = 0.0
    reported_writes: int = 0
    status_p50_s: float = 0.0
    status_p99_s: float = 0.0
    status_cpu_s: float = 0.0
    status_bytes: int = 0
    busy_points_per_s: float = 0.0
    busy_status_p50_s: float = 0.0
    busy_status_p99_s: float = 0.0
    busy_cpu: float = 0.0
    busy_writes_per_s: float = 0.0
    command_s: float = 0.0
    plan_median_s: float = 0.0
    plan_longest_s: float = 0.0
    plan_cpu_s: float = 0.0
    quiet_cpu: float = 0.0
    quiet_writes_per_min: float = 0.0
    resident_mib: float = 0.0
    peak_mib: float = 0.0
    etcd_mib: float = 0.0


TITLES = {
    "agents": "agents",
    "volumes": "volumes",
    "replicas": "replicas",
    "first_reported_s": "start, empty store, until all is reported: s",
    "first_writes": "… writes to etcd",
    "reported_s": "start, full store, until all is reported: s",
    "reported_cpu_s": "… coordinator's CPU: s",
    "reported_writes": "… writes to etcd",
    "status_p50_s": "`status`, every page, quiet, p50: s",
    "status_p99_s": "… p99: s",
    "status_cpu_s": "… coordinator's CPU, quiet cluster's own deducted: s",
    "status_bytes": "… bytes",
    "busy_points_per_s": "CPs a second while busy",
    "busy_status_p50_s": "`status` while busy, p50: s",
    "busy_status_p99_s": "… p99: s",
    "busy_cpu": "coordinator's CPU while busy: of one core",
    "busy_writes_per_s": "writes to etcd while busy: a second",
    "command_s": "`resilver status`, the whole command, median: s",
    "plan_median_s": "plan of all volumes, median: s",
    "plan_longest_s": "… longest: s",
    "plan_cpu_s": "… coordinator's CPU: s",
    "quiet_cpu": "coordinator's CPU, quiet: of one core",
    "quiet_writes_per_min": "writes to etcd, quiet: a minute",
    "resident_mib": "coordinator's memory: MiB",
    "peak_mib": "… peak: MiB",
    "etcd_mib": "etcd's memory: MiB",
}


class Crowd:
    """The agents' process: one line in, one line out."""

    def __init__(self, port: int, shape: Shape, log: Path) -> None:
        command = [sys.executable, "-m", "tests.crowd", "--coordinator", f"127.0.0.1:{port}"]
        command += ["--agents", str(shape.agents), "--volumes", str(shape.volumes)]
        self._log = log.open("wb")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self.hear("ready")

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, line: str, timeout_s: float = 240.0) -> str:
        assert self._process.stdout is not None
        there, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        found = self._process.stdout.readline().decode().strip() if there else "nothing"
        assert found.startswith(line), f"the agents said {found!r} and not {line!r}; see {self._log.name}"
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


@dataclass
class Bench:
    """One size, from an empty etcd on."""

    made: Cluster
    shape: Shape
    found: Found
    stub: Any = None
    channel: grpc.Channel | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def dial(self) -> None:
        if self.channel is not None:
            self.channel.close()
        options = [("grpc.max_receive_message_length", 2 * MIB)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.made.ports['c1']}", options)
        self.stub = coordinator_pb2_grpc.CoordinatorStub(self.channel)

    def status(self) -> list[api.ListVolumesResponse]:
        """Every page, as `resilver status` asks for them."""
        request = api.ListVolumesRequest(view=api.VOLUME_VIEW_BASIC, page_size=1000)
        pages = []
        while True:
            pages.append(self.stub.ListVolumes(request, timeout=60, wait_for_ready=True))
            if not pages[-1].next_page_token:
                return pages
            request.page_token = pages[-1].next_page_token

    def complete(self) -> bool:
        """Whether every replica is there and is what it was made to be."""
        try:
            volumes = [volume for page in self.status() for volume in page.volumes]
        except grpc.RpcError:
            return False
        replicas = [replica for volume in volumes for replica in volume.replicas if replica.reachable]
        in_sync = sum(replica.state == volume_pb2.REPLICA_STATE_IN_SYNC for replica in replicas)
        stale = sum(replica.state == volume_pb2.REPLICA_STATE_STALE for replica in replicas)
        wanted = self.shape.agents * self.shape.volumes
        return (len(volumes), in_sync, stale) == (
            self.shape.volume_count,
            wanted - self.shape.stale_count,
            self.shape.stale_count,
        )

    def plan(self) -> list[api.PlanResyncResponse]:
        """Every page, as `resilver plan --all` asks for them."""
        request = api.PlanResyncRequest(all=True, page_size=1000)
        pages = [self.stub.PlanResync(request, timeout=60)]
        while pages[-1].next_page_token:
            request.page_token = pages[-1].next_page_token
            pages.append(self.stub.PlanResync(request, timeout=60))
        return pages

    def writes(self) -> int:
        """How many transactions have changed etcd so far."""
        endpoint = f"127.0.0.1:{self.made.ports['etcd']}"
        command = ["etcdctl", f"--endpoints={endpoint}", "endpoint", "status", "--write-out=json"]
        env = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(command, check=True, capture_output=True, timeout=20, env=env)
        return int(json.loads(done.stdout)[0]["Status"]["header"]["revision"])

    def cpu_s(self) -> float:
        rest = Path(f"/proc/{self.made.processes['c1'].pid}/stat").read_text().rpartition(")")[2].split()
        return (int(rest[11]) + int(rest[12])) / TICKS

    def resident_mib(self, name: str) -> float:
        status = Path(f"/proc/{self.made.processes[name].pid}/status").read_text()
        return next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")) / 1024

    # ------------------------------------------------------------ the phases

    def first_sight(self, crowd: Crowd) -> None:
        """An empty store and a cluster that is not: everything is learnt from reports, and settled by an election."""
        self.dial()
        wait_for(lambda: self.made.ask("GetCluster", api.GetClusterRequest()), "a leader")
        begun, before = time.monotonic(), self.writes()
        crowd.say("go")
        crowd.hear("reported")
        wait_for(self.complete, "every replica is reported", 120, 0.5)
        self.found.first_reported_s = time.monotonic() - begun
        self.plan()  # the first examine of each volume ends its RECOVERING
        self.found.first_writes = self.writes() - before

    def restart(self, crowd: Crowd) -> None:
        self.made.processes["c1"].stop()
        before = self.writes()
        begun = time.monotonic()
        self.made.restart("c1")
        self.dial()
        crowd.hear("again")
        wait_for(self.complete, "every replica is reported", 120, 0.2)
        self.found.reported_s = time.monotonic() - begun
        self.found.reported_cpu_s = self.cpu_s()
        self.found.reported_writes = self.writes() - before

    def quiet(self) -> None:
        cpu, writes, begun = self.cpu_s(), self.writes(), time.monotonic()
        time.sleep(QUIET_S)
        took = time.monotonic() - begun
        self.found.quiet_cpu = (self.cpu_s() - cpu) / took
        self.found.quiet_writes_per_min = (self.writes() - writes) * 60 / took

    def statuses(self) -> None:
        cpu, begun = self.cpu_s(), time.monotonic()
        times = [timed(self.status) for _ in range(STATUS_CALLS)]
        own = self.found.quiet_cpu * (time.monotonic() - begun)
        self.found.status_cpu_s = (self.cpu_s() - cpu - own) / STATUS_CALLS
        self.found.status_p50_s, self.found.status_p99_s = part(times, 0.50), part(times, 0.99)
        self.found.status_bytes = sum(page.ByteSize() for page in self.status())

    def commands(self) -> None:
        self.found.command_s = part(
            [timed(lambda: self.made.cli("status", "-o", "table")) for _ in range(COMMANDS)], 0.5
        )

    def plans(self) -> None:
        cpu = self.cpu_s()
        times = [timed(self.plan) for _ in range(PLANS)]
        self.found.plan_median_s, self.found.plan_longest_s = part(times, 0.5), max(times)
        self.found.plan_cpu_s = (self.cpu_s() - cpu) / PLANS

    def busy(self, crowd: Crowd) -> None:
        rate = self.shape.volume_count / POINT_EVERY_S
        crowd.say(f"points {rate}")
        cpu, writes, begun = self.cpu_s(), self.writes(), time.monotonic()
        times = []
        while time.monotonic() < begun + QUIET_S:
            times.append(timed(self.status))
            time.sleep(0.2)
        took = time.monotonic() - begun
        crowd.say("points 0")
        self.found.busy_points_per_s = rate
        self.found.busy_status_p50_s, self.found.busy_status_p99_s = part(times, 0.50), part(times, 0.99)
        self.found.busy_cpu = (self.cpu_s() - cpu) / took
        self.found.busy_writes_per_s = (self.writes() - writes) / took


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def part(times: list[float], share: float) -> float:
    """The value that so many are not above."""
    return sorted(times)[math.ceil(share * len(times)) - 1]


@contextlib.contextmanager
def standing(shape: Shape, found: Found) -> Iterator[tuple[Bench, Crowd]]:
    with tempfile.TemporaryDirectory() as place, cluster(Path(place)) as made:
        made.start_coordinator(extra='log_level = "warning"\n')
        crowd = Crowd(made.ports["c1"], shape, Path(place) / "crowd.log")
        try:
            yield Bench(made, shape, found), crowd
        finally:
            crowd.close()


def measure(shape: Shape, found: Found) -> None:
    with standing(shape, found) as (bench, crowd):
        phases = (
            lambda: bench.first_sight(crowd),
            lambda: bench.restart(crowd),
            bench.quiet,
            bench.statuses,
            bench.commands,
            bench.plans,
            lambda: bench.busy(crowd),
        )
        for number, phase in enumerate(phases, 1):
            took = timed(phase)
            print(f"  {shape.agents} agents: phase {number} took {took:.1f} s", file=sys.stderr, flush=True)
            bench.found.resident_mib, bench.found.etcd_mib = bench.resident_mib("c1"), bench.resident_mib("etcd")
            bench.found.peak_mib = max(bench.found.peak_mib, bench.made.processes["c1"].memory_peak_bytes() / MIB)


def table(all_found: list[Found]) -> str:
    def cell(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"

    rows = [f"| | {' | '.join(f'{one.agents:,} agents' for one in all_found)} |", f"|{' --- |' * (len(all_found) + 1)}"]
    rows += [
        f"| {TITLES[one.name]} | {' | '.join(cell(getattr(each, one.name)) for each in all_found)} |"
        for one in fields(Found)[1:]
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--volumes", type=int, default=10, help="of each agent")
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before its time"))
    found = []
    try:
        for agents in asked.agents:
            shape = Shape(agents, asked.volumes)
            found.append(Found(agents, shape.volume_count, agents * asked.volumes))
            measure(shape, found[-1])
    finally:
        print(table(found))
        if asked.json is not None:
            asked.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
