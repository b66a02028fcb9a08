"""Calls to the coordinator, whichever one leads.

The rules:

* The addresses are tried in the order given. One that cannot be reached, or has no leader to name, is passed over.
* NOT_LEADER is followed to the address it names, at most `HOPS_MAX` times in one call.
* Every call has a deadline. A change carries its request_id through all tries, so that it happens once.
* What works once is remembered: the next call starts there.
* Errors leave as `resilver.errors`, never as gRPC's own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

import grpc
from grpc import aio

from resilver import rpc
from resilver.errors import ResilverError, Superseded, Unavailable
from resilver.v1 import coordinator_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
    from types import TracebackType

    from google.protobuf.message import Message

    from resilver.credentials import Credentials

HOPS_MAX: Final = 4
CONNECT_TIMEOUT_S: Final = 5.0
CALL_TIMEOUT_S: Final = 60.0
"""An examine, a snapshot and a plan fit in it; the server's own bound for calls without a deadline."""
STREAM_TIMEOUT_S: Final = 3600.0
"""A watch is opened anew at the latest then."""
SILENCE_MAX_S: Final = 30.0
"""A watch says something every 10 s; three times that and it is dead."""
PAGES_MAX: Final = 1000
PAGE_SIZE: Final = 1000

Req = TypeVar("Req")
Res = TypeVar("Res")
Item = TypeVar("Item")
T = TypeVar("T")

Stub = coordinator_pb2_grpc.CoordinatorStub


class Page(Protocol):
    """A response that may be continued."""

    next_page_token: str


P = TypeVar("P", bound=Page)


class Client:
    """A client of the cluster; use it as an async context manager."""

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float | None = None, tls: Credentials | None = None
    ) -> None:
        self._addresses = list(addresses)
        self._tls = tls
        self._timeout_s = timeout_s
        self._channels: dict[str, aio.Channel] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def call(self, method: Callable[[Stub], aio.UnaryUnaryMultiCallable[Req, Res]], request: Req) -> Res:
        """One call to the leader."""
        timeout_s = self._timeout_s or CALL_TIMEOUT_S

        async def once(stub: Stub) -> Res:
            return await method(stub)(request, timeout=timeout_s)

        return await self._at_leader(once, timeout_s)

    async def stream(
        self, method: Callable[[Stub], aio.UnaryStreamMultiCallable[Req, Res]], request: Req
    ) -> AsyncIterator[Res]:
        """One stream from the leader; Unavailable if it falls silent or breaks, an end if it ends."""

        async def once(stub: Stub) -> tuple[AsyncIterator[Res], Res | None]:
            # The first message is awaited here: only then is it known whether this coordinator leads.
            answers = method(stub)(request, timeout=STREAM_TIMEOUT_S).__aiter__()
            return answers, await _next(answers)

        answers, first = await self._at_leader(once, self._timeout_s or CALL_TIMEOUT_S)
        while first is not None:
            yield first
            try:
                first = await _next(answers)
            except aio.AioRpcError as error:
                raise rpc.to_error(error) from error

    async def pages(
        self,
        method: Callable[[Stub], aio.UnaryUnaryMultiCallable[Any, P]],
        request: Message,
        items: Callable[[P], Iterable[Item]],
    ) -> list[Item]:
        """All items of a list call, page by page."""
        found: list[Item] = []
        request.page_size = PAGE_SIZE  # type: ignore[attr-defined]  # every list request has it
        for _ in range(PAGES_MAX):
            page = await self.call(method, request)
            found.extend(items(page))
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token  # type: ignore[attr-defined]  # as above
        return found

    async def _at_leader(self, once: Callable[[Stub], Awaitable[T]], timeout_s: float) -> T:
        waiting = list(self._addresses)
        tried: set[str] = set()
        hops = 0
        last: ResilverError | None = None
        while waiting:
            address = waiting.pop(0)
            if address in tried:
                continue
            tried.add(address)
            try:
                async with asyncio.timeout(timeout_s + CONNECT_TIMEOUT_S):
                    answer = await once(Stub(await self._connected(address)))
            except aio.AioRpcError as error:
                last = rpc.to_error(error, who=f"the coordinator at {address}")
                if last.reason == "DEADLINE":
                    last = _late(last.message)
            except TimeoutError:
                last = _late(f"{address} did not answer within {timeout_s:g} s")
            except Unavailable as error:
                last = error
            else:
                self._prefer(address)
                return answer
            if not isinstance(last, Unavailable | Superseded):
                raise last
            leader = last.metadata.get("leader_address", "")
            if leader and leader not in tried and hops < HOPS_MAX:
                hops += 1
                waiting.insert(0, leader)
        assert last is not None, "there is always one address to try"
        raise last

    def _doubt(self) -> str:
        """What else it may be: gRPC does not tell a refused handshake from a refused connection."""
        if self._tls is None:
            return "; if it wants certificates, name yours with --tls-ca, --tls-cert and --tls-key"
        return f", or none of cluster {self._tls.name.cluster} that takes the certificate of {self._tls.name}"

    def _prefer(self, address: str) -> None:
        if self._addresses[0] != address:
            self._addresses = [address, *(other for other in self._addresses if other != address)]

    async def _connected(self, address: str) -> aio.Channel:
        """A channel that is ready; a refused connection is known at once, a silent one after a bound."""
        number = 0 if self._tls is None else self._tls.number
        channel = self._channels.get(address)
        if channel is not None and number != self._number:
            # What watches for weeks outlives its certificate's files.
            await self._channels.pop(address).close()
            channel = None
        self._number = number
        if channel is None:
            channel = self._channels[address] = rpc.make_channel(address, tls=self._tls)
        bound_s = min(CONNECT_TIMEOUT_S, self._timeout_s or CONNECT_TIMEOUT_S)
        try:
            async with asyncio.timeout(bound_s):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        # A channel that has failed waits before it dials again: a new one does not.
                        await self._channels.pop(address).close()
                        raise Unavailable("NO_LEADER", f"no coordinator answers at {address}{self._doubt()}")
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            raise Unavailable("NO_LEADER", f"no coordinator answers at {address} within {bound_s:g} s") from None
        return channel


def _late(said: str) -> Unavailable:
    """A call that was given up here, though not there: a coordinator that has begun something ends it."""
    return Unavailable("DEADLINE", f"{said}; what was begun may go on: look first, and wait longer with --timeout")


async def _next(answers: AsyncIterator[Res]) -> Res | None:
    """The next message of a stream; None at its end."""
    try:
        async with asyncio.timeout(SILENCE_MAX_S):
            return await anext(answers)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise Unavailable("DEADLINE", f"the coordinator has said nothing for {SILENCE_MAX_S:g} s") from None
