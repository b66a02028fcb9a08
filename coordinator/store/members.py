"""The members of an etcd cluster: one client each, tried in turn, with a bound on everything.

The rules:

* pyetcd is synchronous: its calls run in threads of our own, each with a deadline.
* A client for each member, instead of pyetcd's own failover: its client is not made for several threads, and for a
  commit it matters to know whether the request can have left before another member is asked.
* The member that answered last is asked first. A member that is dead or hung costs one timeout once.
* What is safe to send twice goes on to the next member; what is not ends with `UnknownOutcome`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pyetcd
import pyetcd.exceptions

from resilver.address import Address
from resilver.config import EtcdConfig
from resilver.errors import Invalid, Unavailable

TRIES_MAX: Final = 3
THREADS: Final = 4
RECEIVE_BYTES_MAX: Final = 64 << 20

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    # The store is part of the cluster: no proxy of the environment, no state shared with other clients.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_NEVER_SENT: Final = ("failed to connect", "DNS resolution failed")
"""How gRPC says that a request has not left. Anything else may have: a wrong guess here costs a reign, no data."""

_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DATA_LOSS,
    }
)

T = TypeVar("T")
Client = Any  # pyetcd ships no types


class Answered(Exception):
    """A member refused, and has changed nothing."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code: Final = code


class UnknownOutcome(Exception):
    """The request may have been carried out, or may yet be."""


class Members:
    """All members of one store."""

    def __init__(self, endpoints: Sequence[Address], config: EtcdConfig) -> None:
        self._endpoints: Final = tuple(endpoints)
        self._config: Final = config
        self._clients: Final[dict[int, Client]] = {}
        self._first = 0
        self._closed = False
        self._threads: Final = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="etcd")

    @property
    def names(self) -> str:
        return ", ".join(str(endpoint) for endpoint in self._endpoints)

    @property
    def count(self) -> int:
        return len(self._endpoints)

    async def call(self, ask: Callable[[Client], T]) -> T:
        """Asks one member after the other. For what may be done twice.

        Raises Unavailable if none answers, `Answered` for a refusal.
        """
        return await self._in_thread(lambda: self._each(ask, twice=True))

    async def call_once(self, ask: Callable[[Client], T]) -> T:
        """The same for what must not be done twice: `UnknownOutcome` once it may have left."""
        return await self._in_thread(lambda: self._each(ask, twice=False))

    async def healthy_count(self) -> int:
        """How many members answer that they know a leader."""
        asked = (self._in_thread(functools.partial(self._is_healthy, index)) for index in range(self.count))
        return sum(await asyncio.gather(*asked))

    async def close(self) -> None:
        """Closes the connections. Closed already is closed."""
        if self._closed:
            return
        self._closed = True
        await self._in_thread(self._close_clients)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _each(self, ask: Callable[[Client], T], *, twice: bool) -> T:
        order = [(self._first + step) % self.count for step in range(min(self.count, TRIES_MAX))]
        renewed = False
        said = ""
        for index in order:
            try:
                client = self._client(index)
            except (grpc.RpcError, pyetcd.Etcd3Exception) as error:
                code, said = _cause(error)
                if code not in _TRANSIENT:
                    raise Answered(code, said) from error
                continue
            try:
                answer = ask(client)
            except (grpc.RpcError, pyetcd.Etcd3Exception) as error:
                code, said = _cause(error)
                if code is grpc.StatusCode.UNAUTHENTICATED and self._config.username and not renewed:
                    # A token has run out; it was refused before anything was done.
                    renewed = True
                    self._forget(index)
                    order.append(index)
                elif code not in _TRANSIENT:
                    raise Answered(code, said) from error
                elif not twice and not any(phrase in said for phrase in _NEVER_SENT):
                    raise UnknownOutcome(f"{self._endpoints[index]}: {said}") from error
            else:
                self._first = index
                return answer
        self._first = (order[-1] + 1) % self.count
        raise Unavailable("STORE_UNAVAILABLE", f"no etcd member of {self.names} answers ({said})")

    def _is_healthy(self, index: int) -> bool:
        try:
            client = self._client(index)
            answer = client.maintenancestub.Status(
                pyetcd.etcdrpc.StatusRequest(), self._config.timeout_s, metadata=client.metadata
            )
        except (grpc.RpcError, pyetcd.Etcd3Exception):
            return False
        return bool(answer.leader)

    def _client(self, index: int) -> Client:
        """The client of one member; two threads may both make one at first, and the later one stays."""
        client = self._clients.get(index)
        if client is None:
            client = self._clients[index] = self._made(self._endpoints[index])
        return client

    def _made(self, address: Address) -> Client:
        config = self._config
        credentials = None
        if config.ca:
            credentials = pyetcd.MultiEndpointEtcd3Client.get_secure_creds(
                config.ca, config.key or None, config.cert or None
            )
        endpoint = pyetcd.Endpoint(
            f"[{address.host}]" if ":" in address.host else address.host,
            address.port,
            secure=credentials is not None,
            creds=credentials,
            # Never shunned: which member is asked is decided here, and pyetcd would judge it by the wall clock.
            time_retry=float("-inf"),
            opts=_OPTIONS,
        )
        user = {}
        if config.username:
            user = {"user": config.username, "password": Path(config.password_file).read_text().rstrip("\n")}
        try:
            client = pyetcd.MultiEndpointEtcd3Client([endpoint], timeout=config.timeout_s, **user)
        except grpc.RpcError:
            endpoint.close()
            raise
        # The token stands in the metadata too, and gRPC refuses call credentials where there is no TLS.
        client.call_credentials = None
        return client

    def _forget(self, index: int) -> None:
        client = self._clients.pop(index, None)
        if client is not None:
            client.close()

    def _close_clients(self) -> None:
        for index in range(self.count):
            self._forget(index)


def check_files(config: EtcdConfig) -> None:
    """Raises Invalid for a file of the configuration that cannot be read, before anything depends on it."""
    for key in ("ca", "cert", "key", "password_file"):
        name = getattr(config, key)
        try:
            if name:
                Path(name).read_bytes()
        except OSError as error:
            field = f"etcd.{key}"
            raise Invalid("CONFIG_INVALID", f"{field}: {name} cannot be read: {error.strerror}", field=field) from error


def _cause(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the words behind an error; pyetcd drops both, but raises while it handles gRPC's own."""
    # Every error of a call is a grpc.Call as well, which is where its code and details are.
    call: object = error if isinstance(error, grpc.RpcError) else error.__context__
    if isinstance(call, grpc.Call):
        return call.code(), call.details() or call.code().name
    return grpc.StatusCode.UNKNOWN, str(error) or type(error).__name__
