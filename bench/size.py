"""What size costs: many volumes on one node, long lineages, sparse images, maps of many ranges; each at two sizes.

    sudo .venv/bin/python bench/size.py [--only volumes lineage sparse ranges] [--large] [--json FILE]

Real agents, file systems on loop devices. For each kind of size two runs that differ in nothing but that: what is in
proportion to what changed stays, and what is in proportion to what exists grows. `--large` takes the sizes that the
project wants to bear (10,000 volumes, a million ranges), and some 12 GiB of memory or disk; without it they are tenths.

CPU is of the agents alone, in seconds or as a part of one core; a busy machine changes it little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from agent.examiner import ReplicaSettings
from agent.identity import Identity
from agent.replica import Replica
from resilver.lineage import ConsistencyPoint
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from resilver.volume import Grant, VolumeRecord
from resilver.wire_pages import report_pages
from tests import namespace
from tests.agent import agents as played
from tests.agent.agents import AgentProcess, Leader, agents
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096
TICKS = os.sysconf("SC_CLK_TCK")
QUIET_S = 60.0
# On a busy machine: what is measured is processor time, and an order is waited for as long as it takes.
ORDER_S, RUN_S = 600.0, 3600.0

Row = dict[str, float]


def cpu_s(pid: int) -> float:
    rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(rest[11]) + int(rest[12])) / TICKS


def figure(pid: int, name: str) -> int:
    row = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return int(row.split()[1])


class Spent:
    """CPU seconds of some processes, from one look to the next."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._before = 0.0
        self.look()

    def look(self) -> float:
        now = sum(map(cpu_s, self._pids))
        before, self._before = self._before, now
        return now - before


# ---------------------------------------------------------------- volumes


def mirrored(place: Path, name: str) -> None:
    """A small image with a CP of its own, as an agent would have left it."""
    image = place / f"{name}.img"
    image.write_bytes(os.urandom(BLOCK))
    backend = ImageBackend(name, image, place / ".resilver" / name, reserve_min_bytes=0)
    record = VolumeRecord(name, f"id-{name}", 1, f"epoch-{name}", "a", ("a",), ConsistencyPoint(1, 1), f"s-{name}")
    backend.save_record(record)
    backend.save_grant(Grant(record.volume_id, 1, record.epoch_id))
    backend.take_snapshot(NewSnapshot(record.newest_id, record.volume_id, record.newest_cp, "", record.epoch_id, 1))


def reported(made: Cluster, count: int) -> bool:
    answer = made.ask("GetNode", api.GetNodeRequest(node="a"))
    if not answer or answer.node.volume_count < count:
        return False
    seen = 0
    request = api.ListVolumesRequest(page_size=1000, view=api.VOLUME_VIEW_BASIC)
    while True:
        page = made.ask("ListVolumes", request)
        if not page:
            return False
        seen += sum(bool(one.replicas and one.replicas[0].snapshot) for one in page.volumes)
        if not page.next_page_token:
            return seen == count
        request.page_token = page.next_page_token


def planned(made: Cluster) -> tuple[float, int]:
    """How long a plan of everything takes, and how many of its volumes were refused."""
    begun, refused = time.monotonic(), 0
    request = api.PlanResyncRequest(all=True, page_size=1000)
    with grpc.insecure_channel(made.console("c1"), [("grpc.max_receive_message_length", 2 * MIB)]) as channel:
        plan = coordinator_pb2_grpc.CoordinatorStub(channel).PlanResync
        while True:
            page = plan(request, timeout=120)
            refused += sum(one.HasField("refusal") for one in page.plan.volumes)
            if not page.next_page_token:
                return time.monotonic() - begun, refused
            request.page_token = page.next_page_token


def volumes(count: int) -> Row:
    names = [f"v{number:05d}" for number in range(count)]
    with (
        mounted("xfs", 4 * GIB) as disk,
        tempfile.TemporaryDirectory() as place,
        cluster(Path(place), "sqlite") as made,
    ):
        for name in names:
            mirrored(disk, name)
        made.start_coordinator(extra='log_level = "warning"\nexamine_timeout_s = 60\n')
        wait_for(lambda: made.ask("GetCluster", api.GetClusterRequest()), "a leader")
        begun = time.monotonic()
        made.start_agent("a", {name: disk / f"{name}.img" for name in names}, 'log_level = "warning"\n')
        pid = made.processes["a"].pid
        threads = 0

        def there() -> bool:
            nonlocal threads
            threads = max(threads, figure(pid, "Threads"))
            return reported(made, count)

        wait_for(there, "every volume is reported", RUN_S, 0.2)
        row = {"start until all is reported: s": time.monotonic() - begun, "… agent's CPU: s": cpu_s(pid)}
        time.sleep(5)
        spent, at = Spent(pid), time.monotonic()
        time.sleep(QUIET_S)
        row["agent's CPU, quiet: of one core"] = spent.look() / (time.monotonic() - at)
        planned(made)  # the first one ends what a store that was empty has to ask
        spent.look()
        row["plan of all volumes: s"], refused = planned(made)
        row["plan, agent's CPU: s"] = spent.look()
        row["plan, volumes refused"] = refused
        row["agent's threads, at most"] = max(threads, figure(pid, "Threads"))
        row["agent's memory, peak: MiB"] = figure(pid, "VmHWM") / KIB
    return row


# ---------------------------------------------------------------- lineage


def lineage(count: int) -> Row:
    with mounted("xfs", 2 * GIB) as disk, tempfile.TemporaryDirectory() as place:
        image = disk / "vm1.img"
        image.write_bytes(os.urandom(MIB))
        backend = ImageBackend("vm1", image, disk / ".resilver" / "vm1", keep_last=10_000, reserve_min_bytes=0)
        backend.save_record(VolumeRecord("vm1", "V", 1, "e1", "a"))

        def take(number: int) -> None:
            parent = f"s{number - 1}" if number else ""
            backend.take_snapshot(NewSnapshot(f"s{number}", "V", ConsistencyPoint(1, number + 1), parent, "e1", number))

        for number in range(count):
            take(number)
        identity = Identity(Path(place) / "state", "test", "a")
        replica = Replica("vm1", "a", backend, identity, ReplicaSettings(keep_last=10_000))
        replica.recover()
        replica.examine()
        time.sleep(2.5)  # what was written a moment ago is read again
        replica.look()
        report = replica.examine()
        row = {
            "a look: CPU ms": each(replica.look),
            "an examine: CPU ms": each(replica.examine),
            "a report: KiB": sum(page.ByteSize() for page in report_pages(report)) / KIB,
            "… pages": len(report_pages(report)),
        }
        numbers = iter(range(count, count + 1000))
        row["taking a CP: CPU ms"] = each(lambda: take(next(numbers)))
        gone = iter(range(1000))
        row["letting one go: CPU ms"] = each(lambda: backend.drop(f"s{next(gone)}"))
        row["delta of neighbours: CPU ms"] = each(lambda: backend.delta_map(f"s{count - 2}", f"s{count - 1}"))
        identity.close()
    return row


def each(work: Callable[[], object], times: int = 10) -> float:
    begun = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begun) / times * 1000


# ---------------------------------------------------------------- sparse and ranges


@contextlib.contextmanager
def pair(kind: str, disk_bytes: int) -> Iterator[tuple[AgentProcess, AgentProcess]]:
    with (
        mounted(kind, disk_bytes) as disk,
        tempfile.TemporaryDirectory() as place,
        agents(Path(place), disk, "a", "b") as (a, b),
    ):
        yield a, b


def moved(a: AgentProcess, b: AgentProcess, leader: Leader, base: str, target: str) -> Any:
    resync_id = str(uuid.uuid4())
    a.prepare(leader, resync_id, base, target, "b")
    b.receive(leader, resync_id, base, target, a, replace_own_data=True, replace_unrelated=True)
    run = b.ended(resync_id, RUN_S)
    assert not run.reason, run
    return run


def through(a: AgentProcess, b: AgentProcess, size_bytes: int, first: list[int], second: list[int]) -> Row:
    """A first copy of an image that has data in the blocks `first`, and a delta of the blocks `second`."""
    leader = Leader()
    write(a.image(), size_bytes, first)
    spent = Spent(a.process.pid, b.process.pid)
    row: Row = {}
    a.open_epoch(leader)
    tip = a.snapshot(leader, opening=True).id
    row["first CP: CPU s"] = spent.look()
    b.open_epoch(leader, primary="a")
    begun = time.monotonic()
    run = moved(a, b, leader, "", tip)
    row["first copy: s"], row["… CPU s"] = time.monotonic() - begun, spent.look()
    row["… ranges"], row["… MiB"] = run.range_count, run.done_bytes / MIB
    write(a.image(), size_bytes, second)
    spent.look()
    base, tip = tip, a.snapshot(leader).id
    row["second CP: CPU s"] = spent.look()
    begun = time.monotonic()
    run = moved(a, b, leader, base, tip)
    row["delta: s"], row["delta: CPU s"] = time.monotonic() - begun, spent.look()
    row["delta: ranges"] = run.range_count
    row["memory of the source, peak: MiB"] = figure(a.process.pid, "VmHWM") / KIB
    row["memory of the target, peak: MiB"] = figure(b.process.pid, "VmHWM") / KIB
    return row


def write(image: Path, size_bytes: int, blocks: list[int]) -> None:
    block = os.urandom(BLOCK)
    with image.open("r+b" if image.exists() else "wb") as file:
        file.truncate(size_bytes)
        for at in blocks:
            os.pwrite(file.fileno(), at.to_bytes(8, "little") + block[8:], at * BLOCK)
        os.fsync(file.fileno())


def sparse(size_bytes: int, kind: str) -> Row:
    every = size_bytes // BLOCK // 2048
    with pair(kind, 2 * GIB) as (a, b):
        return through(
            a, b, size_bytes, [at * every for at in range(2048)], [at * every + 1 for at in range(0, 2048, 16)]
        )


def ranges(count: int) -> Row:
    """Every second block of an image, and then a tenth of them again."""
    with pair("xfs", 3 * count * BLOCK + 2 * GIB) as (a, b):
        return through(a, b, 2 * count * BLOCK, list(range(0, 2 * count, 2)), list(range(0, 2 * count, 20)))


# ---------------------------------------------------------------- all of it


def table(title: str, columns: list[str], rows: list[Row]) -> str:
    def cell(value: float) -> str:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"

    lines = [f"| {title} | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    lines += [f"| {name} | {' | '.join(cell(row[name]) for row in rows)} |" for name in rows[0]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("volumes", "lineage", "sparse", "ranges")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--volumes", type=int, nargs="+", help="other numbers of volumes")
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    asked = parser.parse_args()
    namespace.enter()
    played.DEADLINE_S = ORDER_S
    times = 10 if asked.large else 1
    jobs: dict[str, list[tuple[str, Callable[[], Row]]]] = {
        "volumes": [
            (f"{count:,} volumes", lambda count=count: volumes(count))
            for count in asked.volumes or (100 * times, 1000 * times)
        ],
        "lineage": [(f"{count:,} snapshots", lambda count=count: lineage(count)) for count in (100, 1000)],
        "sparse": [
            (f"{size // GIB:,} GiB, {kind}", lambda size=size, kind=kind: sparse(size, kind))
            for kind, sizes in (("xfs", (16 * GIB, 16 * TIB)), ("ext4", (16 * GIB, 15 * TIB)))
            for size in sizes
        ],
        "ranges": [
            (f"{count:,} ranges", lambda count=count: ranges(count)) for count in (13_107 * times, 104_858 * times)
        ],
    }
    found: dict[str, dict[str, Row]] = {}
    for kind in asked.only:
        rows = []
        for name, job in jobs[kind]:
            begun = time.monotonic()
            rows.append(job())
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        found[kind] = dict(zip((name for name, _ in jobs[kind]), rows, strict=True))
        print(table(kind, list(found[kind]), rows) + "\n", flush=True)
        if asked.json is not None:
            asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
