"""Agents' streams to a real coordinator: who is let in, what is heard, and how a stream ends."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import grpc
import pytest
from grpc import aio

from resilver.rpc import make_channel
from resilver.v1 import agent_pb2, agent_pb2_grpc
from resilver.v1 import coordinator_pb2 as api
from resilver.wire_pages import report_pages
from tests.cluster import Cluster
from tests.coordinator.running import WITHIN_S, client, eventually
from tests.coordinator.small_agent import SmallAgent, empty, written


class Line:
    """A stream on which a test says what it likes."""

    def __init__(self, address: str) -> None:
        self.boot = str(uuid.uuid4())
        self.channel = make_channel(address)
        self.call = agent_pb2_grpc.ReportsStub(self.channel).Report()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.call.cancel()
        await self.channel.close()

    async def say(self, seq: int, boot: str = "", **body) -> None:
        await self.call.write(agent_pb2.ReportRequest(boot=boot or self.boot, seq=seq, **body))

    async def hear(self) -> agent_pb2.ReportResponse:
        async with asyncio.timeout(WITHIN_S):
            answer = await self.call.read()
        assert isinstance(answer, agent_pb2.ReportResponse), "the stream ended"
        return answer

    async def ended(self) -> grpc.StatusCode:
        async with asyncio.timeout(WITHIN_S):
            with contextlib.suppress(aio.AioRpcError):
                while isinstance(await self.call.read(), agent_pb2.ReportResponse):
                    pass
            return await self.call.code()


def hello(node="a", **changes) -> agent_pb2.AgentHello:
    fields = {
        "node": node,
        "cluster": "test",
        "version": "0.1.0",
        "address": ":7401",
        "stream_address": ":7402",
        "volumes": ["vm1"],
    }
    return agent_pb2.AgentHello(**{**fields, **changes})


def page(volume="vm1", last=True) -> agent_pb2.ReplicaPage:
    (whole,) = report_pages(written(volume))
    whole.last = last
    return whole


def together(*volumes) -> agent_pb2.ReplicaPages:
    return agent_pb2.ReplicaPages(pages=[page(one) for one in volumes])


async def volume(stub, name):
    return (await stub.GetVolume(api.GetVolumeRequest(volume=name))).volume


async def test_what_an_agent_reports_is_seen(coordinator):
    async with client(coordinator) as stub:
        agent = SmallAgent("a", {}, replicas={"vm1": written("vm1"), "db1": empty("db1")})
        async with agent.running(coordinator):
            first = await agent.answers.get()
            cluster = await stub.GetCluster(api.GetClusterRequest())
            assert (first.term, first.store_id) == (cluster.term, cluster.store_id)
            assert first.leader_id
            seen = await eventually(lambda: volume(stub, "vm1"), lambda one: one.replicas[0].live.size_bytes)
            assert seen.replicas[0].node == "a"
            assert seen.replicas[0].reachable
            node = (await stub.GetNode(api.GetNodeRequest(node="a"))).node
            assert (node.address, node.volume_count, node.version) == (f"127.0.0.1:{agent.port}", 2, "0.1.0")
        # Gone at once, because the connection has ended, and what was known of it is still shown.
        left = await eventually(lambda: volume(stub, "vm1"), lambda one: not one.replicas[0].reachable)
        assert left.replicas[0].live.size_bytes
        node = (await stub.GetNode(api.GetNodeRequest(node="a"))).node
        assert (node.reachable, node.problems[0].reason) == (False, "NODE_OFFLINE")


async def test_messages_are_acknowledged(coordinator):
    async with client(coordinator), Line(coordinator) as line:
        await line.say(1, hello=hello())
        assert (await line.hear()).acked_seq == 1
        await line.say(2, heartbeat=agent_pb2.Heartbeat())
        await line.say(9, heartbeat=agent_pb2.Heartbeat())
        while (await line.hear()).acked_seq < 9:
            pass


async def test_what_is_not_newer_is_dropped(coordinator):
    async with client(coordinator) as stub, Line(coordinator) as line:
        await line.say(5, hello=hello(volumes=["vm1", "db1"]))
        await line.say(5, replica=page("vm1"))
        await line.say(4, replica=page("vm1"))
        await line.say(6, replica=page("db1"))
        await eventually(lambda: volume(stub, "db1"), lambda one: one.replicas[0].HasField("live"))
        assert not (await volume(stub, "vm1")).replicas[0].HasField("live")


async def test_several_replicas_come_in_one_message(coordinator):
    async with client(coordinator) as stub, Line(coordinator) as line:
        await line.say(1, hello=hello(volumes=["vm1", "db1"]))
        assert (await line.hear()).takes_pages
        await line.say(2, pages=together("vm1", "db1"))
        for name in ("vm1", "db1"):
            await eventually(lambda name=name: volume(stub, name), lambda one: one.replicas[0].HasField("live"))
        assert (await line.hear()).acked_seq == 2


async def test_silence_is_absence(coordinator):
    async with client(coordinator) as stub, Line(coordinator) as line:
        await line.say(1, hello=hello())
        await line.hear()
        assert (await stub.GetNode(api.GetNodeRequest(node="a"))).node.reachable
        assert await line.ended() is grpc.StatusCode.UNAVAILABLE
        await eventually(lambda: stub.GetNode(api.GetNodeRequest(node="a")), lambda one: not one.node.reachable)


async def test_a_stream_that_says_nothing_at_all_is_closed(coordinator):
    async with client(coordinator), Line(coordinator) as line:
        assert await line.ended() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ({"heartbeat": agent_pb2.Heartbeat()}, "INVALID_FIELD"),
        ({"hello": hello(node="a/b")}, "INVALID_FIELD"),
        ({"hello": hello(cluster="other")}, "CLUSTER_MISMATCH"),
        ({"hello": hello(store_id="another-store")}, "WRONG_STORE"),
    ],
)
async def test_who_does_not_belong_here_is_told_why(coordinator, first, reason):
    async with client(coordinator) as stub, Line(coordinator) as line:
        await line.say(1, **first)
        # Its first answer, before any acknowledgement, from which an agent would learn where it belongs.
        answer = await line.hear()
        assert answer.refusal.reason == reason
        assert answer.refusal.message
        assert not answer.adopt_store
        assert await line.ended() is grpc.StatusCode.OK
        # Nobody who is obeyed, but somebody an operator should hear of; a name that is none is not repeated.
        nodes = (await stub.ListNodes(api.ListNodesRequest())).nodes
        told = [(node.name, node.reachable, [one.reason for one in node.problems]) for node in nodes]
        assert told == ([] if reason == "INVALID_FIELD" else [("a", False, [reason])])


async def test_an_agent_of_another_store_is_told_to_adopt_this_one_after_an_operator_said_so(coordinator):
    async with client(coordinator) as stub:
        store_id = (await stub.GetCluster(api.GetClusterRequest())).store_id
        await stub.AdoptStore(api.AdoptStoreRequest(store_id=store_id))
        async with Line(coordinator) as line:
            await line.say(1, hello=hello(store_id="the-old-store"))
            answer = await line.hear()
            assert (answer.refusal.reason, answer.adopt_store, answer.store_id) == ("WRONG_STORE", True, store_id)
        async with Line(coordinator) as line:
            await line.say(1, hello=hello(store_id=store_id))
            assert (await line.hear()).acked_seq == 1


@pytest.mark.parametrize(
    ("second", "boot"),
    [
        ({"hello": hello()}, ""),
        ({}, ""),
        ({"heartbeat": agent_pb2.Heartbeat()}, "another-boot"),
        ({"replica": page("db1")}, ""),
        ({"replica": agent_pb2.ReplicaPage(last=True)}, ""),
        ({"pages": together("vm1", "vm1")}, ""),
        ({"pages": together("vm1", "db1")}, ""),
        ({"pages": agent_pb2.ReplicaPages(pages=[page("vm1", last=False)])}, ""),
        ({"pages": agent_pb2.ReplicaPages(pages=[page("vm1")] * 101)}, ""),
    ],
)
async def test_what_no_agent_says_ends_the_stream(coordinator, second, boot):
    async with client(coordinator) as stub, Line(coordinator) as line:
        await line.say(1, hello=hello())
        await line.hear()
        await line.say(2, boot, **second)
        assert await line.ended() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: stub.GetNode(api.GetNodeRequest(node="a")), lambda one: not one.node.reachable)


async def test_two_agents_of_one_name_are_neither_believed(coordinator):
    async with client(coordinator) as stub:
        first = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
        second = SmallAgent("a", {}, replicas={"vm1": written("vm1")})
        async with first.running(coordinator):
            await eventually(lambda: volume(stub, "vm1"), lambda one: one.replicas[0].reachable)
            async with second.running(coordinator):
                node = await eventually(
                    lambda: stub.GetNode(api.GetNodeRequest(node="a")), lambda one: not one.node.reachable
                )
                assert node.node.problems[0].reason == "DUPLICATE_NODE"
                assert not (await volume(stub, "vm1")).replicas[0].reachable
            await eventually(lambda: stub.GetNode(api.GetNodeRequest(node="a")), lambda one: one.node.reachable)
            # What the other one said is not taken for this one's: its next report counts.
            first.report("vm1")
            await eventually(lambda: volume(stub, "vm1"), lambda one: one.replicas[0].reachable)


async def test_a_coordinator_that_stops_names_no_leader_and_ends_the_stream(tmp_path):
    cluster = Cluster(tmp_path, "sqlite")
    cluster.start_coordinator()
    try:
        address = f"127.0.0.1:{cluster.ports['c1']}"
        async with client(address), Line(address) as line:
            await line.say(1, hello=hello())
            await line.hear()
            cluster.processes["c1"].send(15)
            answer = await line.hear()
            assert answer.WhichOneof("body") == "not_leader"
            assert await line.ended() is grpc.StatusCode.OK
    finally:
        cluster.close()
