"""What a cluster costs in which nothing changes: three agents, a hundred volumes, one coordinator, one etcd.

    sudo .venv/bin/python bench/quiet.py [--volumes 100] [--seconds 120] [--json FILE]

All are real processes on this machine, with small images on one XFS; every replica is in sync before the watch begins.
Counted over the time given, for each daemon: ticks of the CPU, what it has sent and received (the kernel's own figures
of its connections, `ss -ti`), what it has written to disk, and its memory; and of etcd how many transactions changed it
and how often it synced its log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2
from tests import namespace
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted

MIB = 1 << 20
NODES = ("a", "b", "c")
DAEMONS = ("c1", *NODES, "etcd")
TICKS = os.sysconf("SC_CLK_TCK")
SETTLE_S = 70.0
"""A comparison of each live copy once a minute is part of being quiet; what the first copies left behind is not."""


@dataclass
class Reading:
    """What has been counted so far; bytes and ticks by daemon."""

    at: float
    ticks: dict[str, int]
    sent: dict[str, int]
    received: dict[str, int]
    disk: dict[str, int]
    revision: int
    syncs: float
    proposals: float


def read(made: Cluster) -> Reading:
    pids = {name: made.processes[name].pid for name in DAEMONS}
    sent, received = traffic(pids)
    metrics = etcd_metrics(made)
    return Reading(
        at=time.monotonic(),
        ticks={name: ticks(pid) for name, pid in pids.items()},
        sent=sent,
        received=received,
        disk={name: figure(f"/proc/{pid}/io", "write_bytes") for name, pid in pids.items()},
        revision=revision(made),
        syncs=metrics["etcd_disk_wal_fsync_duration_seconds_count"],
        proposals=metrics["etcd_server_proposals_applied_total"],
    )


def ticks(pid: int) -> int:
    """Of the process, and of the children that it has waited for."""
    rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, rest[11:15]))


def figure(path: str, name: str) -> int:
    row = next(row for row in Path(path).read_text().splitlines() if row.startswith(f"{name}:"))
    return int(row.split()[1])


def traffic(pids: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that each daemon has sent and received on the connections that it has now."""
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)
    names = {pid: name for name, pid in pids.items()}
    done = subprocess.run(["ss", "-tinpH"], check=True, capture_output=True, text=True, timeout=20)
    owner = ""
    for row in done.stdout.splitlines():
        found = re.search(r"pid=(\d+)", row)
        if found is not None:
            owner = names.get(int(found[1]), "")
            continue
        for counts, field in ((sent, "bytes_sent"), (received, "bytes_received")):
            counted = re.search(rf"\b{field}:(\d+)", row)
            if owner and counted is not None:
                counts[owner] += int(counted[1])
    return dict(sent), dict(received)


def etcd_metrics(made: Cluster) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{made.ports['etcd']}/metrics", timeout=10) as answer:
        rows = (row.split() for row in answer.read().decode().splitlines() if not row.startswith("#"))
        return {row[0]: float(row[1]) for row in rows}


def revision(made: Cluster) -> int:
    command = ["etcdctl", f"--endpoints=127.0.0.1:{made.ports['etcd']}", "endpoint", "status", "--write-out=json"]
    env = {**os.environ, "ETCDCTL_API": "3"}
    done = subprocess.run(command, check=True, capture_output=True, timeout=20, env=env)
    return int(json.loads(done.stdout)[0]["Status"]["header"]["revision"])


def healthy(made: Cluster, count: int) -> bool:
    answer = made.ask("ListVolumes", api.ListVolumesRequest(page_size=1000, view=api.VOLUME_VIEW_BASIC))
    states = [row.state for row in answer.volumes] if answer else []
    return states == [volume_pb2.VOLUME_STATE_HEALTHY] * count


def build(made: Cluster, disk: Path, count: int) -> None:
    """The cluster, every replica in sync."""
    names = [f"vol{number:03d}" for number in range(count)]
    made.start_coordinator(extra='log_level = "warning"\n')
    for node in NODES:
        (disk / node).mkdir()
        if node == NODES[0]:
            for name in names:
                (disk / node / f"{name}.img").write_bytes(os.urandom(MIB))
        made.start_agent(node, {name: disk / node / f"{name}.img" for name in names}, 'log_level = "warning"\n')
    for node in NODES:
        wait_for(lambda node=node: made.node(node).get("reachable"), f"{node} reports", 120)
    print("first copies …", file=sys.stderr, flush=True)
    made.cli("resync", "--all", timeout_s=280)
    wait_for(lambda: healthy(made, count), "every replica is in sync", 120, 1.0)


def shown(before: Reading, after: Reading, made: Cluster) -> dict[str, dict[str, float]]:
    """Of each daemon: part of a core, bytes a second, resident memory."""
    took = after.at - before.at
    return {
        name: {
            "cpu_percent": 100 * (after.ticks[name] - before.ticks[name]) / TICKS / took,
            "sent_bytes_per_s": (after.sent.get(name, 0) - before.sent.get(name, 0)) / took,
            "received_bytes_per_s": (after.received.get(name, 0) - before.received.get(name, 0)) / took,
            "disk_bytes_per_s": (after.disk[name] - before.disk[name]) / took,
            "resident_mib": figure(f"/proc/{made.processes[name].pid}/status", "VmRSS") / 1024,
        }
        for name in DAEMONS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    asked = parser.parse_args()
    namespace.enter()
    with mounted("xfs", 4 << 30) as disk, tempfile.TemporaryDirectory() as place, cluster(Path(place)) as made:
        build(made, disk, asked.volumes)
        print("waiting until it is quiet …", file=sys.stderr, flush=True)
        time.sleep(SETTLE_S)
        before = read(made)
        time.sleep(asked.seconds)
        after = read(made)
        daemons = shown(before, after, made)
    minutes = (after.at - before.at) / 60
    etcd = {
        "changes_per_min": (after.revision - before.revision) / minutes,
        "log_syncs_per_min": (after.syncs - before.syncs) / minutes,
        "proposals_per_min": (after.proposals - before.proposals) / minutes,
    }
    print("| daemon | CPU, of one core | sent | received | written to disk | memory |\n|" + " --- |" * 6)
    for name, row in daemons.items():
        print(
            f"| {name} | {row['cpu_percent']:.2f} % | {row['sent_bytes_per_s']:,.0f} B/s "
            f"| {row['received_bytes_per_s']:,.0f} B/s | {row['disk_bytes_per_s']:,.0f} B/s "
            f"| {row['resident_mib']:.0f} MiB |"
        )
    print("\netcd, each minute: " + ", ".join(f"{value:.1f} {name}" for name, value in etcd.items()))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"daemons": daemons, "etcd": etcd}, indent=2) + "\n")


if __name__ == "__main__":
    main()
