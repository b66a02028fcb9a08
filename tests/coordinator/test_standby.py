"""A coordinator that does not lead names the one that does, to operators and to agents."""

from __future__ import annotations

import shutil
import signal

import grpc
import pytest

from resilver.rpc import make_channel
from resilver.status_details import to_error
from resilver.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2_grpc
from resilver.v1 import coordinator_pb2 as api
from tests.cluster import Cluster
from tests.coordinator.running import client, eventually
from tests.coordinator.small_agent import SmallAgent, written

pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="two coordinators need etcd, which is not here")


LEASE_TTL_S = 90
"""Longer than anybody here waits: who takes over has not waited for it."""
STOP_MAX_S = 15.0
"""Ten seconds are promised; the rest is for a machine that has other things to do."""


@pytest.fixture
def two(tmp_path):
    cluster = Cluster(tmp_path, "etcd", lease_ttl_s=LEASE_TTL_S)
    cluster.start_coordinator("c1")
    try:
        yield cluster
    finally:
        cluster.close()


async def asked(call):
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return to_error(caught.value)


def stopped(cluster: Cluster, name: str) -> None:
    """SIGTERM: it ends well, and soon."""
    process = cluster.processes[name].running
    assert process is not None
    process.terminate()
    assert process.wait(STOP_MAX_S) == 0, cluster.log(name)[-2000:]
    assert "Traceback" not in cluster.log(name)


async def test_a_leader_that_is_stopped_ends_although_its_store_hangs(two):
    async with client(f"127.0.0.1:{two.ports['c1']}"):
        two.processes["etcd"].send(signal.SIGSTOP)
        stopped(two, "c1")


async def test_a_standby_names_the_leader_and_takes_over_from_it(two):
    leading = f"127.0.0.1:{two.ports['c1']}"
    async with client(leading):
        two.start_coordinator("c2")
        standby = f"127.0.0.1:{two.ports['c2']}"
        async with make_channel(standby) as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)

            async def named():
                error = await asked(stub.GetCluster(api.GetClusterRequest()))
                return error.metadata.get("leader_address")

            assert await eventually(named, bool) == leading
            error = await asked(stub.WatchVolumes(api.WatchVolumesRequest()).read())
            assert (error.reason, error.exit_code) == ("NOT_LEADER", 4)

            stream = agent_pb2_grpc.ReportsStub(channel).Report()
            agent = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
            await stream.write(agent_pb2.ReportRequest(boot=agent.boot, seq=1, hello=agent.hello()))
            answer = await stream.read()
            assert answer.not_leader.address == leading
            assert await stream.read() is grpc.aio.EOF

    stopped(two, "c1")
    async with client(standby) as stub, agent.running(standby):
        cluster = await stub.GetCluster(api.GetClusterRequest())
        assert (cluster.leader, cluster.term) == ("c2", 2)
        assert (await agent.answers.get()).term == 2
