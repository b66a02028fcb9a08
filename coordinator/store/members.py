"""The members of an etcd cluster: one client each, tried in turn, with a bound on everything.

The rules:

* pyetcd is synchronous: its calls run in threads of our own, each with a deadline.
* A client for each member, instead of pyetcd's own failover: its client is not made for several threads, and for a
  commit it matters to know whether the request can have left before another member is asked.
* The member that answered last is asked first. A member that is dead or hung costs one timeout once.
* What is safe to send twice goes on to the next member; what is not ends with `UnknownOutcome`.
* A client whose token has run out, or whose certificate has been renewed, is followed by a new one, and closed once
  no call can be using it any more: another thread's commit would otherwise end with an outcome that nobody knows. Files
  that do not fit each other, as while they are being replaced, change nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pyetcd
import pyetcd.exceptions

from resilver.address import Address
from resilver.config import EtcdConfig
from resilver.credentials import Stamp, stamp_of
from resilver.errors import Invalid, Unavailable

TRIES_MAX: Final = 3
THREADS: Final = 4
RETIRED_CALLS: Final = 3
"""For how many calls' time a client that is followed by another one stays open."""
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


@dataclass(frozen=True, slots=True)
class _Held:
    """A client, and the files that it was made of, as they were."""

    client: Client
    stamp: Stamp


class Members:
    """All members of one store."""

    def __init__(self, endpoints: Sequence[Address], config: EtcdConfig) -> None:
        self._endpoints: Final = tuple(endpoints)
        self._config: Final = config
        self._clients: Final[dict[int, _Held]] = {}
        self._retired: Final[list[tuple[float, Client]]] = []
        self._making: Final = tuple(threading.Lock() for _ in endpoints)
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
            except OSError as error:
                said = str(error)
                continue
            except (grpc.RpcError, pyetcd.Etcd3Exception) as error:
                code, said = _cause(error)
                if code not in _TRANSIENT:
                    raise Answered(code, said) from error
                continue
            try:
                answer = ask(client)
            except (grpc.RpcError, pyetcd.Etcd3Exception) as error:
                code, said = _cause(error)
                if self._config.username and not renewed and _token_ended(code, said):
                    # It was refused before anything was done.
                    renewed = True
                    self._retire(index, client)
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
        except (OSError, grpc.RpcError, pyetcd.Etcd3Exception):
            return False
        return bool(answer.leader)

    def _client(self, index: int) -> Client:
        """The client of one member. One thread makes it, and the others wait for that: a password costs etcd time.

        A member that hangs holds them up for one timeout; then each tries by itself, and the latest one stays.
        """
        held = self._present(index)
        if held is not None:
            return held
        acquired = self._making[index].acquire(timeout=self._config.timeout_s)
        try:
            return self._present(index) or self._another(index)
        finally:
            if acquired:
                self._making[index].release()

    def _present(self, index: int) -> Client | None:
        """The client that is there, unless it is of files that have been replaced since."""
        held = self._clients.get(index)
        if held is None or (held.stamp != self._stamp() and self._fits()):
            return None
        return held.client

    def _another(self, index: int) -> Client:
        stamp = self._stamp()
        made = self._made(self._endpoints[index])
        earlier = self._clients.get(index)
        if earlier is not None:
            self._retire(index, earlier.client)
        self._clients[index] = _Held(made, stamp)
        return made

    def _stamp(self) -> Stamp:
        return stamp_of(Path(name) for name in (self._config.ca, self._config.cert, self._config.key) if name)

    def _fits(self) -> bool:
        """Whether the files can be read, and the key is the certificate's."""
        try:
            context = ssl.create_default_context(cafile=self._config.ca or None)
            if self._config.cert:
                context.load_cert_chain(self._config.cert, self._config.key or None)
        except OSError:
            return False
        return True

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

    def _retire(self, index: int, client: Client) -> None:
        """Has a new client made in place of this one, unless that has been done; and closes those of long ago."""
        held = self._clients.get(index)
        if held is None or held.client is not client:
            return
        self._clients.pop(index, None)
        now = time.monotonic()
        self._retired.append((now, client))
        while self._retired and now - self._retired[0][0] > RETIRED_CALLS * self._config.timeout_s:
            self._retired.pop(0)[1].close()

    def _close_clients(self) -> None:
        clients = [held.client for held in self._clients.values()] + [client for _, client in self._retired]
        self._clients.clear()
        self._retired.clear()
        for client in clients:
            client.close()


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


def _token_ended(code: grpc.StatusCode, said: str) -> bool:
    """Whether a token has run out, was forgotten, or is older than a change of users or roles."""
    return code is grpc.StatusCode.UNAUTHENTICATED or "revision of auth store is old" in said


def _cause(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the words behind an error; pyetcd drops both, but raises while it handles gRPC's own."""
    # Every error of a call is a grpc.Call as well, which is where its code and details are.
    call: object = error if isinstance(error, grpc.RpcError) else error.__context__
    if isinstance(call, grpc.Call):
        return call.code(), call.details() or call.code().name
    return grpc.StatusCode.UNKNOWN, str(error) or type(error).__name__
