"""How long it takes until another coordinator acts once the leader is killed.

    sudo .venv/bin/python bench/takeover.py [TIMES] [TTL_S]

Three members of etcd, two coordinators, two agents. Each time the leader gets SIGKILL; measured is the time from then
to the first consistency point that an agent has taken on the order of the other one, which is more than to lead: it has
read the store and heard the agents. Prints the median, the ends and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resilver.v1 import coordinator_pb2 as api
from tests import etcd, namespace
from tests.acceptance import images
from tests.acceptance.images import MIB
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted

VOLUME = "vm1"


def point(made: Cluster) -> bool:
    answer = made.ask("CreateSnapshot", api.CreateSnapshotRequest(volumes=[VOLUME]))
    return bool(answer and answer.snapshots)


def once(made: Cluster) -> float:
    old = wait_for(made.leader, "somebody leads")
    # One that stands by: it has asked who leads, and knows.
    wait_for(lambda: point(made), "the leader acts")
    time.sleep(2.0)
    made.processes[old].kill()
    begun = time.monotonic()
    wait_for(lambda: point(made), "another one acts", every_s=0.05)
    took_s = time.monotonic() - begun
    assert made.leader() != old
    made.restart(old)
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", nargs="?", type=int, default=20, metavar="TIMES", help="how many kills [20]")
    parser.add_argument("ttl_s", nargs="?", type=int, default=10, metavar="TTL_S", help="the lease, in seconds [10]")
    asked = parser.parse_args()
    times, ttl_s = asked.times, asked.ttl_s
    namespace.enter()
    with (
        tempfile.TemporaryDirectory(prefix="takeover-") as directory,
        mounted("xfs", 1 << 30) as disk,
        etcd.running(Path(directory), 3) as store,
        cluster(Path(directory)) as made,
    ):
        made.etcd_url, made.lease_ttl_s = store.url, ttl_s
        for name in ("c1", "c2"):
            made.start_coordinator(name)
        images.make(disk / "a" / f"{VOLUME}.img", 4 * MIB, MIB, seed=1)
        (disk / "b").mkdir()
        for node in "ab":
            made.start_agent(node, {VOLUME: disk / node / f"{VOLUME}.img"}, volume_extra="keep_last = 10000")
        made.wait_reachable(VOLUME, "a", "b")
        made.ok("resync", VOLUME)
        took = sorted(once(made) for _ in range(times))
    median = statistics.median(took)
    print(f"lease of {ttl_s} s, {times} kills: median {median:.1f} s, from {took[0]:.1f} to {took[-1]:.1f} s")
    print(json.dumps({"ttl_s": ttl_s, "took_s": [round(one, 2) for one in took], "median_s": round(median, 2)}))


if __name__ == "__main__":
    main()
