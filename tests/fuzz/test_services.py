"""Random requests at every call of every service, of real servers on real sockets: each is answered or refused.

No crash, no INTERNAL, nothing that does not end; afterwards the server serves as before, and its log holds no fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from resilver.errors import Invalid
from resilver.rpc import make_channel
from resilver.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2
from tests.agent.agents import AgentProcess, Leader, write_image
from tests.coordinator.running import client
from tests.coordinator.small_agent import SmallAgent, empty, written
from tests.fuzz.wild import Wild

REQUESTS = 25
"""For each call."""
CALL_MAX_S = 40.0
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}
WRITTEN_TOO_LATE = "Internal error from Core"
"""What the client's own gRPC says of a message that it could not send because the server has ended the call."""
FAULTS = ("unforeseen", "Traceback", "INTERNAL")


def calls(module: Any, service: str) -> list[Any]:
    return list(module.DESCRIPTOR.services_by_name[service].methods)


async def answered(stub: Any, method: Any, request: Any) -> str:
    """Sends it; the status that it ended with, of a stream after its first message."""
    call = getattr(stub, method.name)
    try:
        if not method.server_streaming:
            await call(request, timeout=CALL_MAX_S)
            return "OK"
        stream = call(request, timeout=CALL_MAX_S)
        async with asyncio.timeout(CALL_MAX_S):
            await stream.read()
        stream.cancel()
    except aio.AioRpcError as caught:
        error = caught
    else:
        return "OK"
    assert error.code() not in NEVER, f"{method.name}: {error.code()} {error.details()}\n{request}"
    return error.code().name


async def all_answered(stub: Any, methods: list[Any], module: Any, wild: Wild) -> dict[str, set[str]]:
    """Some requests of each, several at a time; the statuses that they ended with."""
    seen: dict[str, set[str]] = {}
    for method in methods:
        kind = getattr(module, method.input_type.name)
        made = [wild.message(kind, sense=wild.chance.choice((0.5, 0.9, 0.98, 1.0))) for _ in range(REQUESTS)]
        for at in range(0, len(made), 5):
            ended = await asyncio.gather(*(answered(stub, method, one) for one in made[at : at + 5]))
            seen.setdefault(method.name, set()).update(ended)
    return seen


async def test_the_coordinator_answers_anything(coordinator, tmp_path):
    known = {
        "volume": ["vm1"], "volumes": ["vm1"], "node": list("ab"), "nodes": list("ab"),
        "request_id": [str(uuid.uuid4())], "path": [str(tmp_path / "out")], "page_size": [0, 1, 10], "page_token": [""],
        "etag": [""], "id": ["s1"], "validate_only": [True, False], "choose": ["a", "b"], "source": ["a"],
    }  # fmt: skip
    async with client(coordinator) as stub, contextlib.AsyncExitStack() as stack:
        world: dict[str, SmallAgent] = {}
        for node in "ab":
            agent = SmallAgent(node, world, replicas={"vm1": written("vm1") if node == "a" else empty("vm1")})
            agent.receiving.set()
            await stack.enter_async_context(agent.running(coordinator))
        seen = await all_answered(
            stub, calls(coordinator_pb2, "Coordinator"), coordinator_pb2, Wild("coordinator", known)
        )
        assert (await stub.GetCluster(coordinator_pb2.GetClusterRequest())).cluster
    # The requests were no mere nonsense: what reads has been read, and what orders was refused and obeyed.
    assert sum("OK" in one for one in seen.values()) > len(seen) / 2, seen
    assert all(one != {"OK"} for name, one in seen.items() if name.startswith(("Start", "Elect", "Delete"))), seen


async def test_the_coordinator_hears_anything(coordinator):
    """Streams of reports: a hello that is one or none, and then whatever comes."""
    known = {"node": ["z"], "cluster": ["test"], "boot": ["b1"], "address": ["127.0.0.1:9"], "seq": range(1, 50)}
    known |= {"stream_address": ["127.0.0.1:9"], "volume": ["vz"], "volumes": ["vz"], "presence": [1], "id": ["s1"]}
    wild = Wild("reports", known)
    async with client(coordinator) as stub, make_channel(coordinator) as channel:
        for _ in range(REQUESTS):
            hello = agent_pb2.ReportRequest(boot="b1", seq=1)
            hello.hello.CopyFrom(wild.message(agent_pb2.AgentHello, sense=0.97))
            rest = [wild.message(agent_pb2.ReportRequest, sense=0.9) for _ in range(8)]
            call = agent_pb2_grpc.ReportsStub(channel).Report(timeout=CALL_MAX_S)
            try:
                for message in [hello, *rest]:
                    await call.write(message)
                await call.done_writing()
                while await call.read() is not aio.EOF:
                    pass
            except (asyncio.InvalidStateError, aio.AioRpcError):
                pass  # it has ended, maybe before all was said
            if await call.details() != WRITTEN_TOO_LATE:
                assert await call.code() not in NEVER, f"{await call.details()}\n{hello}{rest}"
        assert (await stub.GetCluster(coordinator_pb2.GetClusterRequest())).cluster


@pytest.fixture
def agent(tmp_path):
    """A real agent on plain files, whose volume has two CPs."""
    place = tmp_path / "disk"
    place.mkdir()
    process = AgentProcess("a", tmp_path, place)
    write_image(process.image(), 1 << 20)
    process.start()
    yield process
    process.close()


async def test_an_agent_answers_anything(agent, tmp_path):
    leader = Leader()
    agent.open_epoch(leader)
    tip = agent.snapshot(leader, opening=True)
    known = {
        "cluster": ["test"], "store_id": ["store-1"], "term": [1], "leader_id": ["leader-1"], "volume": ["vm1"],
        "volume_id": [leader.volume_id], "epoch": [1], "epoch_id": ["epoch-1"], "expected_tip": [tip.id, ""],
        "id": [tip.id, "s9"], "target": [tip.id, "s9"], "base": ["", tip.id], "ticket": ["t1"], "resync_id": ["r1"],
        "target_node": ["b"], "path": [str(tmp_path / "out"), str(tmp_path / ".." / "x")], "primary": ["a"],
        "members": ["a", "b"], "address": ["127.0.0.1:9"], "stream_address": ["127.0.0.1:9"], "node": ["b"],
        "snapshot": [tip.id], "ticket_lifetime_seconds": [60], "offset": [0, 4096], "length": [4096],
        "group_id": ["g1"], "newest_id": [tip.id], "opening": [False],
    }  # fmt: skip
    wild = Wild("agent", known)
    async with make_channel(f"127.0.0.1:{agent.port}") as channel:
        orders = agent_pb2_grpc.AgentStub(channel)
        seen = await all_answered(orders, calls(agent_pb2, "Agent"), agent_pb2, wild)
        seen |= await all_answered(agent_pb2_grpc.PeerStub(channel), calls(agent_pb2, "Peer"), agent_pb2, wild)
        assert (await orders.GetAgent(agent_pb2.GetAgentRequest())).node == "a"
    assert agent.process.alive
    assert not any(fault in agent.log() for fault in FAULTS), agent.log()[-4000:]
    assert {"OpenEpoch", "PrepareSend", "GetAgent"} <= {name for name, one in seen.items() if "OK" in one}, seen


async def test_nothing_is_exported_among_the_agents_own_files(agent, tmp_path):
    """What a guest has written would pass there for a hook that is still to be run, or for a record."""
    leader = Leader()
    agent.open_epoch(leader)
    tip = agent.snapshot(leader, opening=True)
    (tmp_path / "link").symlink_to(tmp_path / "state-a")
    state, snapshots = tmp_path / "state-a", agent.place / ".resilver" / "vm1"
    before = sorted(tmp_path.rglob("*"))
    for path in (
        state / "x.json", state / "volumes" / "vm9.json", tmp_path / "link" / "runs.json", snapshots / "x",
        snapshots / "preserved" / "x", tmp_path / "disk" / ".." / "out", Path("relative"), tmp_path / "link",
    ):  # fmt: skip
        with pytest.raises(Invalid) as caught:
            agent.call(
                "CloneSnapshot", agent_pb2.CloneSnapshotRequest(header=leader.header(), id=tip.id, path=str(path))
            )
        assert caught.value.metadata["field"] == "path"
    assert sorted(tmp_path.rglob("*")) == before
    request = agent_pb2.CloneSnapshotRequest(header=leader.header(), id=tip.id, path=str(tmp_path / "out"))
    assert agent.call("CloneSnapshot", request).size_bytes == 1 << 20
