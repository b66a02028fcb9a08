"""Twenty simulated agents with ten volumes each, one real coordinator, one real etcd: what is written, and when."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests import etcd
from tests.cluster import cluster, wait_for
from tests.crowd import Shape

SHAPE = Shape(agents=20)
WITHIN_S = 60.0

pytestmark = pytest.mark.skipif(not etcd.available(), reason="etcd is not installed")


class Agents:
    """The agents' process; see `tests/crowd.py`."""

    def __init__(self, port: int) -> None:
        words = ["--coordinator", f"127.0.0.1:{port}", "--agents", str(SHAPE.agents)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crowd", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.hear("ready")

    def hear(self, line: str) -> None:
        there, _, _ = select.select([self.process.stdout], [], [], WITHIN_S)
        assert there, f"the agents have not said {line!r}"
        assert self.process.stdout.readline().decode().strip() == line

    def say(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def agents(port: int) -> Iterator[Agents]:
    made = Agents(port)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def states(made) -> dict[int, int]:
    """How many replicas are in each state, of those that are reachable."""
    answer = made.ask("ListVolumes", api.ListVolumesRequest(view=api.VOLUME_VIEW_BASIC, page_size=1000))
    found = [row.state for volume in answer.volumes for row in volume.replicas if row.reachable] if answer else []
    return {state: found.count(state) for state in set(found)}


ALL = {
    pb.REPLICA_STATE_IN_SYNC: SHAPE.agents * SHAPE.volumes - SHAPE.stale_count,
    pb.REPLICA_STATE_STALE: SHAPE.stale_count,
}


def heard_at(made) -> float:
    """When the node that was silent for longest was last heard of."""
    answer = made.ask("ListNodes", api.ListNodesRequest(page_size=1000))
    return min((one.report_time.ToMilliseconds() / 1000 for one in answer.nodes), default=0.0) if answer else 0.0


def test_nothing_is_written_while_nothing_changes(tmp_path):
    with etcd.running(tmp_path) as store, cluster(tmp_path) as made:

        def revision() -> int:
            status = json.loads(store.etcdctl("endpoint", "status", "--write-out=json"))
            return status[0]["Status"]["header"]["revision"]

        made.etcd_url = store.url
        made.start_coordinator()
        with agents(made.ports["c1"]) as crowd:
            wait_for(lambda: made.ask("GetCluster", api.GetClusterRequest()), "a leader")
            crowd.say("go")
            crowd.hear("reported")
            wait_for(lambda: states(made) == ALL, "every replica is what it says")
            first = made.ask("PlanResync", api.PlanResyncRequest(all=True, page_size=40))
            assert (len(first.plan.volumes), bool(first.next_page_token)) == (40, True)
            before, since = revision(), heard_at(made)
            # Three heartbeats of every agent, and a plan of everything, change nothing that is stored.
            wait_for(lambda: heard_at(made) > since + 6, "every agent is heard of three times more")
            assert made.ask("PlanResync", api.PlanResyncRequest(all=True)).plan.etag == first.plan.etag
            assert revision() == before
            made.processes["c1"].stop()
            made.restart("c1")
            crowd.hear("again")
            wait_for(lambda: states(made) == ALL, "every replica is what it says")
            # The old reign's end, the new one's beginning.
            assert revision() <= before + 2
