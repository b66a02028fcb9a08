"""Questions to a coordinator that runs as a process."""

from __future__ import annotations

import asyncio
import contextlib

from grpc import aio

from resilver.rpc import make_channel
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc

WITHIN_S = 40.0


@contextlib.asynccontextmanager
async def client(address):
    """What an operator asks; waits until the coordinator leads."""
    async with make_channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        await eventually(lambda: stub.GetCluster(api.GetClusterRequest()))
        yield stub


async def eventually(ask, good=lambda answer: True):
    """The first good answer, of a question that is asked again until then."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            with contextlib.suppress(aio.AioRpcError):
                answer = await ask()
                if good(answer):
                    return answer
            await asyncio.sleep(0.05)
